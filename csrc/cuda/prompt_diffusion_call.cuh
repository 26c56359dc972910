// A call of prompt_diffusion before its launches, whichever way it goes: the problem as the kernels see it, and which
// layout takes it.

#pragma once

#include "../prompt_diffusion.h"
#include "launch.cuh"
#include "prompt_diffusion_rows.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {

// In prompt_diffusion_backward.cu.
const char* prompt_diffusion_backward(const PromptDiffusion&, const PromptDiffusionGradients&, const Runtime&);

namespace {

using T = element::FAST_PROMPT_ELEMENT;

// ---- float32 weights beside half activations ----

constexpr int ROUNDING_THREADS = 256;

__global__ void __launch_bounds__(ROUNDING_THREADS)
    round_weights_kernel(const Matrix<float> weights, int64_t elements, int width, T* rounded, T* rest) {
  const int64_t i = int64_t{blockIdx.x} * ROUNDING_THREADS + threadIdx.x;
  if (i >= elements) return;
  const float weight = weights.data[weights.offset(i / width) + i % width];
  assign(rounded[i], weight);
  if (rest) assign(rest[i], weight - to_float(rounded[i]));
}

// ---- From the caller's description to the kernels' ----

Matrix<T> rounded_weights(const Rows& weights, int64_t rows, int64_t width, const Runtime& runtime,
                          Launches& launches, Matrix<T>* rest = nullptr) {
  T* rounded = allocate<T>(runtime, rows * width);
  T* remainder = rest ? allocate<T>(runtime, rows * width) : nullptr;
  if (rest) *rest = contiguous(remainder, rows, width);
  launches.add(round_weights_kernel, dim3(static_cast<unsigned>(ceil_div(rows * width, ROUNDING_THREADS))),
               ROUNDING_THREADS, 0, matrix<float>(weights), rows * width, static_cast<int>(width), rounded, remainder);
  return contiguous(rounded, rows, width);
}

Problem<T> describe(const PromptDiffusion& given, bool backward, const Runtime& runtime, Launches& launches) {
  Problem<T> problem{};
  problem.hidden = matrix<T>(given.hidden);
  problem.source = matrix<T>(given.source);
  if (given.prompts.dtype == Dtype::FLOAT32 && !std::is_same<T, float>::value) {
    problem.prompts = rounded_weights(given.prompts, given.num_prompts, given.width, runtime, launches,
                                      backward ? &problem.prompts_rest : nullptr);
    problem.keys = rounded_weights(given.keys, given.num_prompts, given.width, runtime, launches,
                                   backward ? &problem.keys_rest : nullptr);
  } else {
    problem.prompts = matrix<T>(given.prompts);
    problem.keys = matrix<T>(given.keys);
  }
  problem.rows = given.rows;
  problem.width = static_cast<int>(given.width);
  problem.num_prompts = static_cast<int>(given.num_prompts);
  problem.log_scale = given.log_scale;
  problem.seed = given.dropout.seed;
  problem.softmax = given.activation == DiffusionActivation::SOFTMAX;
  problem.max_weight = given.row_weight == RowWeight::MAX;
  problem.dropout_threshold = given.dropout.threshold;
  problem.kept_scale = given.dropout.kept_scale;
  problem.aligned = given.width * sizeof(T) % PIECE_BYTES == 0 && is_aligned(problem.hidden) &&
                    is_aligned(problem.source) && is_aligned(problem.prompts) && is_aligned(problem.keys);
  return problem;
}

// ---- Layouts, and which one takes a call. The figures are reasoned, not yet measured on a GPU. ----

using Small64 = Layout<1, 4, 1, 2, 4, 4>;    // 16 rows: latency
using Small256 = Layout<1, 4, 1, 8, 3, 1>;   // 16 rows
using Wide16 = Layout<4, 1, 1, 2, 4, 4>;     // 64 rows
using Wide64 = Layout<4, 1, 1, 8, 3, 3>;     // 64 rows
using Both64 = Layout<4, 1, 1, 8, 3, 2>;     // 64 rows, registers for S and D
using Tall208 = Layout<4, 2, 2, 13, 3, 1>;   // 128 rows
using Both208 = Layout<4, 2, 1, 13, 3, 1>;   // 64 rows, registers for S and D
using Wide256 = Layout<2, 4, 2, 8, 2, 1>;    // 64 rows

template <class Launch>
struct Choice {
  int rows, columns;
  int64_t (*shared_bytes)(int64_t num_prompts);
  Launch* launch;
};

// The narrowest layout that takes all prompts at once, or failing that the widest one, of those whose shared memory
// this device has. Layouts of 16 rows come first where taller ones would leave multiprocessors idle, and else last. The
// choices are in order of width.
template <class Launch, int COUNT>
const Choice<Launch>* choose(const Choice<Launch> (&choices)[COUNT], int64_t rows, int64_t num_prompts,
                             const Device& device) {
  const bool few_rows = rows <= int64_t{16} * device.multiprocessors;
  for (const bool at_once : {true, false})
    for (const bool small : {few_rows, !few_rows})
      for (int i = 0; i < COUNT; ++i) {
        const auto& choice = choices[at_once ? i : COUNT - 1 - i];
        if ((choice.rows == 16) == small && (choice.columns >= num_prompts) == at_once &&
            choice.shared_bytes(num_prompts) <= device.shared_bytes)
          return &choice;
      }
  return nullptr;
}

constexpr char TOO_LITTLE_SHARED_MEMORY[] =
    "prompt_diffusion: this GPU has too little shared memory for so many prompts";

// No more blocks than run at a time, and as many tiles for each, so that none is left over for a thin last round.
template <class L>
unsigned row_blocks(int64_t rows, const Device& device) {
  const int64_t tiles = ceil_div(rows, L::ROWS), rounds = ceil_div(tiles, int64_t{L::BLOCKS} * device.multiprocessors);
  return static_cast<unsigned>(ceil_div(tiles, rounds));
}

}  // namespace
}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
