// skip_adapter on CUDA GPUs, sm_80 and up: see ../skip_adapter.h for what it computes. Not yet run on a GPU.
//
// What it costs, for M rows (bf16; e.g. M = 64 * 577, d = 768, w = 96, on an H100 with 3.0 TB/s and 600 TFLOP/s by
// mma.sync):
//   forward   bytes 2 M d 2 (read x, write y) = 113 MB, 38 us, and 2 M w for a hidden layer that is kept; operations
//             4 M d w = 10.9 GFLOP, 18 us. So memory is the floor, and arithmetic has to hide behind it.
//   backward  bytes 2 M d 5 (x, g in, dx out; x and g again for the weights) = 284 MB, 95 us, and 8 M w for t and dh;
//             operations 8 M d w = 22 GFLOP, 36 us.
//
// Forward, one kernel. A block of threads takes tiles of 16 to 96 rows, one after another, its warps sharing out rows
// and, within them, columns. Where [rows, d] fits, the tile is in shared memory (Resident96: 96 rows of 768 in bf16),
// as chunks of 128 bytes of each row. Mean and deviation of a row come from there, one after the other; then h = z
// W_d^T, x being normed in registers, on its way to the tensor cores; t goes, rounded, into shared memory; and, chunk
// by chunk, v = s (W_u t + b_u), whose warp adds it to its part of the chunk of x, writes y, and starts to load the
// same part of the next tile. The weights come through a ring of cp.async stages, from L2, once for each tile: that is
// why tiles are tall. The ring does not pause between adapters, nor between tiles. In a run, y stays where x was until
// the last adapter. Rows too wide for that (Streamed64: d = 4096) come through the ring beside the weights: read once
// for the statistics of a norm, once for each block of the hidden layer, once for the result, mostly from L2; there the
// adapters of a run are launches of their own, from the second on in place.
//
// Gates or a route: no tile has rows of two samples; those of kept samples are left out. With gates the operand of the
// up projection is, for each group, t times its gate for one expert after another, so that the mixture is one product;
// a chunk with columns of several groups takes one for each, the weight's other rows being zeros. A norm after the
// adapter has to see all of a row's v: the up projection then runs twice.
//
// Backward, for each adapter from the last: a kernel over row tiles, products over all rows for the weights, and sums
// of parts in a fixed order, so that the same call on the same card gives the same bits. The rows within a run come of
// the forward kernel again, from the hidden layers (Purpose::replay); so does the gradient of what a norm after the
// adapter is of (derive). Row tiles: q = dv W_u, from it dh, then dz = W_d^T dh and dx; all rows come through the ring.
// What the backward of a norm before must know of a whole row of dz are sums of dh times what is known before: sum_k dz
// norm_weight = sum_j dh_j sum_k W_d norm_weight, and sum_k dz norm_weight xhat = sum_j dh_j (h_j - its part that is no
// row's). The weights: with P = dh^T xhat, dW_d = P norm_weight + (sum dh) norm_bias, and the norm's own gradients are
// sums over W_d of P and of dh; dW_u = s t^T dv.
//
// float32 multiplies as three TF32 products (tile.cuh). float32 parameters beside half activations are rounded to the
// activations' type first.
//
// Compiled once per type of the activations, FAST_PROMPT_ELEMENT: float32, bfloat16 or float16.

#include "kernels.h"
#include "skip_adapter_call.cuh"
#include "skip_adapter_forward.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {
namespace {

// ---- float32 parameters beside half activations ----

constexpr int ROUNDING_THREADS = 256;

__global__ void __launch_bounds__(ROUNDING_THREADS)
    round_parameters_kernel(const Matrix<float> parameters, int64_t elements, int64_t width, T* rounded) {
  const int64_t i = int64_t{blockIdx.x} * ROUNDING_THREADS + threadIdx.x;
  if (i < elements) assign(rounded[i], parameters.data[parameters.offset(i / width) + i % width]);
}

// ---- Layouts, and which one takes a call. The figures are reasoned, not yet measured on a GPU. ----

template <class L>
constexpr Choice<RowResults<T>> FORWARD = {L::ROWS,       L::RESIDENT, L::BLOCKS,
                                           L::THREADS,    L::ROW_WARPS, forward_shared_bytes<T, L>,
                                           forward_kernel<T, L>};

// The taller one needs more registers in float32 than there are.
using Resident = std::conditional_t<sizeof(T) == 2, Resident96, Resident64>;

constexpr Choice<RowResults<T>> FORWARDS[] = {FORWARD<Resident>, FORWARD<Streamed64>, FORWARD<Resident16>,
                                              FORWARD<Streamed16>};

}  // namespace

// ---- A call ----

SkipAdapterCall::SkipAdapterCall(const SkipAdapter& given, const Runtime& runtime)
    : given(given), runtime(runtime), device(runtime), launches(runtime.stream) {
  const bool apart = given.gates || given.route;
  problem.x = matrix<T>(given.x);
  problem.rows = given.batch * given.tokens;
  problem.sample_rows = apart ? given.tokens : problem.rows;
  problem.width = static_cast<int>(given.width);
  problem.adapter_width = static_cast<int>(given.adapter_width);
  problem.experts = static_cast<int>(given.experts);
  problem.groups = static_cast<int>(given.groups);
  problem.group_width = problem.width / problem.groups;
  problem.expert_width = problem.adapter_width / problem.groups;
  problem.adapters = given.route ? 1 : static_cast<int>(given.adapters);
  problem.scale = given.scale;
  problem.gates = given.gates;
  problem.route = given.route;
  problem.seed = given.dropout.seed;
  problem.norm = given.norm;
  problem.activation = given.activation;
  problem.residual = given.residual;
  problem.eps = given.eps;
  problem.dropout_threshold = given.dropout.threshold;
  problem.kept_scale = given.dropout.kept_scale;
  problem.down_weight = parameters(given.down_weight, given.adapters, given.adapter_width, given.width);
  problem.up_weight = parameters(given.up_weight, given.adapters, given.width, problem.up_depth());
  problem.down_bias = parameters(given.down_bias, 1, given.adapters, given.adapter_width);
  problem.up_bias = parameters(given.up_bias, 1, given.gates ? given.experts : given.adapters, given.width);
  problem.norm_weight = parameters(given.norm_weight, 1, given.adapters, given.width);
  problem.norm_bias = parameters(given.norm_bias, 1, given.adapters, given.width);
  problem.aligned = given.width * sizeof(T) % PIECE_BYTES == 0 && is_aligned(problem.down_weight) &&
                    is_aligned(problem.up_weight) && is_aligned(problem.norm_weight) && is_aligned(problem.norm_bias);
  samples = problem.rows / problem.sample_rows;
  parallel_adapters = given.route ? static_cast<unsigned>(given.adapters) : 1;
}

// float32 beside half activations is rounded first.
Matrix<T> SkipAdapterCall::parameters(const Rows& given_rows, int64_t count, int64_t rows, int64_t width) {
  Matrix<T> found = matrix<T>(given_rows);
  if (found.data && given.down_weight.dtype == Dtype::FLOAT32 && !std::is_same<T, float>::value) {
    const int64_t elements = count * rows * width;
    T* const rounded = scratch<T>(elements);
    launches.add(round_parameters_kernel, blocks_of(elements, ROUNDING_THREADS), ROUNDING_THREADS, 0,
                 matrix<float>(given_rows), elements, width, rounded);
    found = contiguous<T>(rounded, count * rows, width);
  }
  if (found.rows_per_batch != rows) found.batch_stride = rows * found.row_stride;
  found.rows_per_batch = rows;
  return found;
}

const Choice<RowResults<T>>* SkipAdapterCall::choose_forward(const Problem<T>& pass) const {
  return choose(FORWARDS, pass, device);
}

bool SkipAdapterCall::pass_rows(Problem<T> pass, const RowResults<T>& results) {
  pass.aligned = pass.aligned && is_aligned(pass.x) && is_aligned(contiguous<T>(results.output, 0, 0));
  const auto* choice = choose_forward(pass);
  if (!choice) return false;
  const int turns = choice->resident ? 1 : pass.adapters;
  pass.adapters /= turns;
  for (int turn = 0; turn < turns; ++turn) {
    launches.add(choice->kernel, row_blocks(choice->rows, choice->blocks), choice->threads,
                 choice->shared_bytes(pass), pass, results);
    pass.first_adapter += 1;
    pass.x = contiguous<T>(results.output, pass.rows, pass.width);
  }
  return true;
}

const char* SkipAdapterCall::forward(const SkipAdapterResults& results) {
  const bool launched = pass_rows(
      problem, {Purpose::forward, data_of<T>(results.output), static_cast<T*>(results.hidden), nullptr});
  return launched ? launches.error() : TOO_LITTLE_SHARED_MEMORY;
}

namespace {

const char* forward(const SkipAdapter& given, const SkipAdapterResults& results, const Runtime& runtime) {
  return SkipAdapterCall(given, runtime).forward(results);
}

}  // namespace

extern const SkipAdapterKernels<Runtime> skip_adapter{forward, skip_adapter_backward};

}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
