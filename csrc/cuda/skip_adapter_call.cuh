// A call of skip_adapter before its launches, whichever way it goes: the problem as the kernels see it, which layout
// takes it, and passes of the forward kernel over rows, which the backward makes too. Each unit has its own tables of
// layouts; skip_adapter.cu says how the work is laid out.

#pragma once

#include "launch.cuh"
#include "skip_adapter_rows.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {

using namespace skip;
using T = element::FAST_PROMPT_ELEMENT;

template <class Results>
struct Choice {
  int rows, resident, blocks, threads, row_warps;
  int64_t (*shared_bytes)(const Problem<T>&);
  void (*kernel)(Problem<T>, Results);
};

// In skip_adapter_backward.cu.
const char* skip_adapter_backward(const SkipAdapter&, const SkipAdapterGradients&, const Runtime&);

namespace {

// ---- Layouts, and which one takes a call. The figures are reasoned, not yet measured on a GPU. ----

using Resident96 = Layout<3, 2, 2, 6, 3, 1, 1>;
using Resident64 = Layout<2, 4, 2, 3, 3, 1, 1>;
using Resident16 = Layout<1, 4, 1, 3, 4, 2, 1>;  // latency
using Streamed64 = Layout<2, 4, 2, 3, 3, 1, 0>;
using Streamed16 = Layout<1, 4, 1, 3, 3, 2, 0>;

// The first that this device has the shared memory for; those of 16 rows first where taller ones would leave
// multiprocessors idle, and else last.
template <class Results, int COUNT>
const Choice<Results>* choose(const Choice<Results> (&choices)[COUNT], const Problem<T>& problem,
                              const Device& device) {
  const bool few_rows = problem.rows <= int64_t{16} * device.multiprocessors;
  for (const bool small : {few_rows, !few_rows})
    for (const auto& choice : choices)
      if ((choice.rows == 16) == small && choice.shared_bytes(problem) <= device.shared_bytes) return &choice;
  return nullptr;
}

constexpr char TOO_LITTLE_SHARED_MEMORY[] =
    "skip_adapter: this GPU has too little shared memory for so wide a hidden layer";

unsigned blocks_of(int64_t elements, int64_t block) { return static_cast<unsigned>(ceil_div(elements, block)); }

}  // namespace

// What both directions make of a call. Compiled with the forward, whose kernels the backward launches again.
class SkipAdapterCall {
 public:
  SkipAdapterCall(const SkipAdapter& given, const Runtime& runtime);

  const char* forward(const SkipAdapterResults& results);

 protected:
  const SkipAdapter& given;
  const Runtime& runtime;
  const Device device;
  Launches launches;
  Problem<T> problem{};
  int64_t samples;             // that differ
  unsigned parallel_adapters;  // those of a route; adapters of a run come one after another

  template <class E>
  E* scratch(int64_t count) {
    return allocate<E>(runtime, count);
  }

  int64_t tiles_of_sample(int rows) const { return ceil_div(problem.sample_rows, rows); }

  // No more blocks than run at a time, and as many tiles for each, so that none is left over for a thin last round.
  unsigned row_blocks(int rows, int blocks) const {
    const int64_t tiles = samples * tiles_of_sample(rows);
    return blocks_of(tiles, ceil_div(tiles, int64_t{blocks} * device.multiprocessors));
  }

  // `count` matrices [rows, width], a batch.
  Matrix<T> parameters(const Rows& given_rows, int64_t count, int64_t rows, int64_t width);

  // The forward kernel for a pass; null if the device has too little shared memory.
  const Choice<RowResults<T>>* choose_forward(const Problem<T>& pass) const;

  // A run stays on chip where its rows do; else its adapters come one after another, from the second on in place. False
  // if the device has too little shared memory.
  bool pass_rows(Problem<T> pass, const RowResults<T>& results);
};

}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
