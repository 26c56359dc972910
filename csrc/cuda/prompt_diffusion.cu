// prompt_diffusion on CUDA GPUs, sm_80 and up: see prompt_diffusion.h for what it computes. Not yet run on a GPU.
//
// What it costs, for M rows (bf16; e.g. M = 64 * 577, d = 768, on an H100 with 3.0 TB/s and 600 TFLOP/s by mma.sync):
//   forward   bytes 2 M d 3 (read X and H, write Y) = 170 MB, 57 us; operations 4 M p d = 1.8, 7.3, 23 GFLOP for
//             p = 16, 64, 200, which is 3, 12, 38 us. So memory is the floor, and arithmetic has to hide behind it.
//   backward  bytes 2 M d (X, G in, dX, dH out, H in for ds; X and G again for dP, dK) = 7 M d 2 = 397 MB, 132 us, and
//             8 M p for the coefficients below; operations 10 M p d = 4.5, 18, 57 GFLOP, 8, 30, 95 us.
//
// Forward, one kernel. A block of threads takes tiles of 16 to 128 rows, one after another. First S = X K^T: chunks of
// X and K (128 bytes of each row) come by cp.async into a ring of stages, and S stays in registers, each warp holding
// [16 M, 8 N] of the tile. There the activation, dropout and the row maximum happen (lanes of a row by shuffles, warps
// through a few floats of shared memory), and R goes, rounded, into shared memory, since in the second product every
// warp needs all of its rows. Then, over the same ring, chunks of H and P: Y = e^s (H + w R P), chunk by chunk. The
// ring does not pause between the two, nor between row tiles. So X and H are read once, Y is written once, S and R
// never leave the chip, and P and K come from L2, once for each tile: that is why tiles are tall (128 rows) where p is
// large, and short (16) where there are too few rows to fill the chip.
//
// More prompts than a tile of scores is wide are taken in blocks. The tile of R then holds them all, and softmax's
// shift moves from block to block, as in flash attention.
//
// Backward, three kernels. Row tiles: S again, D = G P^T in registers beside it, then dS, and dX = dS K as above; dH
// and sum(G * H) from the chunks of G as they pass. Then dP = (e^s w R)^T G and dK = dS^T X, sums over all rows, by
// [prompts, chunk] tiles and splits of the rows; and the splits are added up in order, so that the same call on the
// same card gives the same bits. The row tiles hand the coefficients e^s w R and dS on in scratch memory, [M, p] each:
// to compute them again for every chunk of d would cost d / 64 times the arithmetic, to keep all of dP and dK on chip
// is only possible for p = 16, and they are p / d of the size of X. S itself is not among them.
//
// float32 multiplies as three TF32 products (tile.cuh), not by FFMA: the error is that of float32, the rate about
// twice FFMA's, and the code the same as for the half types. float32 weights beside half activations are rounded to the
// activations' type first; the backward takes what rounding left of them as a second part of every chunk of K and P,
// since the sign of S decides where ReLU has a gradient, and the sum that is ds may cancel.
//
// Compiled once per type of the activations, FAST_PROMPT_ELEMENT: float32, bfloat16 or float16.

#include "prompt_diffusion.h"

#include "launch.cuh"
#include "prompt_diffusion_backward.cuh"
#include "prompt_diffusion_forward.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {
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
  if (given.float_weights && !std::is_same<T, float>::value) {
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
  problem.seed = given.seed;
  problem.softmax = given.softmax;
  problem.max_weight = given.max_weight;
  problem.dropout_threshold = given.dropout_threshold;
  problem.kept_scale = given.kept_scale;
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

// ---- Forward ----

using ForwardLaunch = void(const Problem<T>&, T* output, const Device&, Launches&);

template <class L>
void launch_forward(const Problem<T>& problem, T* output, const Device& device, Launches& launches) {
  launches.add(forward_kernel<T, L>, dim3(row_blocks<L>(problem.rows, device)), L::THREADS,
               L::template shared_bytes<T>(problem.num_prompts), problem, output);
}

template <class L>
constexpr Choice<ForwardLaunch> FORWARD = {L::ROWS, L::COLUMNS, L::template shared_bytes<T>, launch_forward<L>};

constexpr Choice<ForwardLaunch> FORWARDS[] = {FORWARD<Wide16>,  FORWARD<Small64>,  FORWARD<Wide64>,
                                              FORWARD<Tall208>, FORWARD<Small256>, FORWARD<Wide256>};

const char* forward(const PromptDiffusion& given, void* output, const Runtime& runtime) {
  const Device device;
  Launches launches(runtime.stream);
  Problem<T> problem = describe(given, false, runtime, launches);
  problem.aligned = problem.aligned && reinterpret_cast<uintptr_t>(output) % PIECE_BYTES == 0;
  const auto* choice = choose(FORWARDS, problem.rows, problem.num_prompts, device);
  if (!choice) return TOO_LITTLE_SHARED_MEMORY;
  choice->launch(problem, static_cast<T*>(output), device, launches);
  return launches.error();
}

// ---- Backward ----

using RowsLaunch = void(const Problem<T>&, const RowGradients<T>&, const Device&, Launches&);

template <class L>
void launch_rows(const Problem<T>& problem, const RowGradients<T>& gradients, const Device& device,
                 Launches& launches) {
  launches.add(backward_rows_kernel<T, L>, dim3(row_blocks<L>(problem.rows, device)), L::THREADS,
               L::template shared_bytes<T>(problem.num_prompts), problem, gradients);
}

template <class L>
constexpr Choice<RowsLaunch> BACKWARD = {L::ROWS, L::COLUMNS, L::template shared_bytes<T>, launch_rows<L>};

constexpr Choice<RowsLaunch> BACKWARDS[] = {BACKWARD<Wide16>, BACKWARD<Small64>, BACKWARD<Both64>,
                                            BACKWARD<Both208>, BACKWARD<Small256>};

// dP and dK: as many splits of the rows as give every multiprocessor two blocks.
template <class L>
void launch_weight_gradients(WeightGradients<T>& all, int wanted, int64_t splits_of, Launches& launches) {
  const int64_t chunks = ceil_div(all.width, CHUNK<T>), tiles = ceil_div(all.num_prompts, L::PROMPTS) * chunks;
  launches.add(weight_gradients_kernel<T, L>,
               dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(splits_of), static_cast<unsigned>(wanted)),
               L::THREADS, L::shared_bytes(), all);
}

using Weights16 = WeightLayout<T, 1, 4, 1>;
using Weights64 = WeightLayout<T, 4, 1, 1>;
using Weights128 = WeightLayout<T, 4, 2, 2>;

int64_t count_splits(const WeightGradients<T>& all, int wanted, const Device& device) {
  const int64_t prompts = all.num_prompts <= 16 ? 16 : all.num_prompts <= 64 ? 64 : 128;
  const int64_t tiles = ceil_div(all.num_prompts, prompts) * ceil_div(all.width, CHUNK<T>) * wanted;
  return std::min(ceil_div(all.rows, SPLIT_STEP), ceil_div(2 * device.multiprocessors, tiles));
}

template <class W>
void reduce(const WeightGradients<T>& all, void* const (&results)[2], int wanted, int64_t splits,
            const float* log_scale_parts, int64_t row_tiles, float* log_scale, Launches& launches) {
  Reduction<W> reduction{};
  for (int i = 0; i < wanted; ++i) {
    reduction.parts[i] = all.wanted[i].parts;
    reduction.results[i] = static_cast<W*>(results[i]);
  }
  reduction.wanted = wanted;
  reduction.splits = static_cast<int>(splits);
  reduction.elements = int64_t{all.num_prompts} * all.width;
  reduction.log_scale_parts = log_scale_parts;
  reduction.row_tiles = row_tiles;
  reduction.log_scale = log_scale;
  const int64_t blocks = wanted ? ceil_div(reduction.elements, REDUCTION_THREADS) : 1;
  launches.add(reduce_kernel<W>, dim3(static_cast<unsigned>(blocks), wanted + (log_scale ? 1 : 0)), REDUCTION_THREADS,
               log_scale ? REDUCTION_THREADS * sizeof(double) : 0, reduction);
}

const char* backward(const PromptDiffusion& given, const PromptDiffusionGradients& gradients, const Runtime& runtime) {
  const Device device;
  Launches launches(runtime.stream);
  Problem<T> problem = describe(given, true, runtime, launches);
  const auto* choice = choose(BACKWARDS, problem.rows, problem.num_prompts, device);
  if (!choice) return TOO_LITTLE_SHARED_MEMORY;

  const int64_t row_tiles = ceil_div(problem.rows, choice->rows);
  RowGradients<T> rows{};
  rows.grad = matrix<T>(gradients.grad);
  rows.hidden = static_cast<T*>(gradients.hidden);
  rows.source = static_cast<T*>(gradients.source);
  rows.coefficient_pitch = static_cast<int>(ceil_div(problem.num_prompts, 8) * 8);
  if (gradients.log_scale) rows.log_scale = allocate<float>(runtime, row_tiles);
  problem.aligned = problem.aligned && is_aligned(rows.grad) && is_aligned(contiguous(rows.hidden, 0, 0)) &&
                    is_aligned(contiguous(rows.source, 0, 0));

  // The gradients of P and K that are wanted: their coefficients, and what these multiply.
  struct Wanted {
    void* result;
    T** coefficients;
    float** units;
    const Matrix<T>& activations;
  };
  const Wanted candidates[] = {{gradients.prompts, &rows.prompt_coefficients, &rows.prompt_units, rows.grad},
                               {gradients.keys, &rows.key_coefficients, &rows.key_units, problem.source}};
  WeightGradients<T> weights{};
  void* results[2] = {};
  int wanted = 0;
  for (const Wanted& candidate : candidates) {
    if (!candidate.result) continue;
    *candidate.coefficients = allocate<T>(runtime, problem.rows * rows.coefficient_pitch);
    *candidate.units = allocate<float>(runtime, row_tiles);
    weights.wanted[wanted] = {contiguous<T>(*candidate.coefficients, problem.rows, rows.coefficient_pitch),
                              candidate.activations, *candidate.units, nullptr};
    results[wanted++] = candidate.result;
  }
  choice->launch(problem, rows, device, launches);
  if (!wanted && !gradients.log_scale) return launches.error();

  weights.rows = problem.rows;
  weights.unit_rows = choice->rows;
  weights.width = problem.width;
  weights.num_prompts = problem.num_prompts;
  weights.aligned = problem.aligned;
  int64_t splits = 0;
  if (wanted) {
    splits = count_splits(weights, wanted, device);
    weights.split_rows = ceil_div(ceil_div(problem.rows, splits), SPLIT_STEP) * SPLIT_STEP;
    splits = ceil_div(problem.rows, weights.split_rows);
    for (int i = 0; i < wanted; ++i)
      weights.wanted[i].parts = allocate<float>(runtime, splits * problem.num_prompts * problem.width);
    if (problem.num_prompts <= 16)
      launch_weight_gradients<Weights16>(weights, wanted, splits, launches);
    else if (problem.num_prompts <= 64)
      launch_weight_gradients<Weights64>(weights, wanted, splits, launches);
    else
      launch_weight_gradients<Weights128>(weights, wanted, splits, launches);
  }
  if (given.float_weights)
    reduce<float>(weights, results, wanted, splits, rows.log_scale, row_tiles, gradients.log_scale, launches);
  else
    reduce<T>(weights, results, wanted, splits, rows.log_scale, row_tiles, gradients.log_scale, launches);
  return launches.error();
}

}  // namespace

extern const PromptDiffusionKernels prompt_diffusion{forward, backward};

}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
