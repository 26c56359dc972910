// skip_adapter on CUDA GPUs, sm_80 and up: see skip_adapter.h for what it computes. Not yet run on a GPU.
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

#include "skip_adapter.h"

#include <vector>

#include "launch.cuh"
#include "skip_adapter_backward.cuh"
#include "skip_adapter_forward.cuh"
#include "skip_adapter_weights.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {
namespace {

using T = element::FAST_PROMPT_ELEMENT;

// ---- float32 parameters beside half activations ----

constexpr int ROUNDING_THREADS = 256;

__global__ void __launch_bounds__(ROUNDING_THREADS)
    round_parameters_kernel(const Matrix<float> parameters, int64_t elements, int64_t width, T* rounded) {
  const int64_t i = int64_t{blockIdx.x} * ROUNDING_THREADS + threadIdx.x;
  if (i < elements) assign(rounded[i], parameters.data[parameters.offset(i / width) + i % width]);
}

// ---- Layouts, and which one takes a call. The figures are reasoned, not yet measured on a GPU. ----

using Resident96 = Layout<3, 2, 2, 6, 3, 1, 1>;
using Resident64 = Layout<2, 4, 2, 3, 3, 1, 1>;
using Resident16 = Layout<1, 4, 1, 3, 4, 2, 1>;  // latency
using Streamed64 = Layout<2, 4, 2, 3, 3, 1, 0>;
using Streamed16 = Layout<1, 4, 1, 3, 3, 2, 0>;

unsigned blocks_of(int64_t elements, int64_t block) { return static_cast<unsigned>(ceil_div(elements, block)); }

template <class Results>
struct Choice {
  int rows, resident, blocks, threads, row_warps;
  int64_t (*shared_bytes)(const Problem<T>&);
  void (*kernel)(Problem<T>, Results);
};

template <class L>
constexpr Choice<RowResults<T>> FORWARD = {L::ROWS,       L::RESIDENT, L::BLOCKS,
                                           L::THREADS,    L::ROW_WARPS, forward_shared_bytes<T, L>,
                                           forward_kernel<T, L>};
template <class L>
constexpr Choice<RowGradients<T>> BACKWARD = {L::ROWS,       L::RESIDENT, L::BLOCKS,
                                              L::THREADS,    L::ROW_WARPS, backward_shared_bytes<T, L>,
                                              backward_kernel<T, L>};

// The taller one needs more registers in float32 than there are.
using Resident = std::conditional_t<sizeof(T) == 2, Resident96, Resident64>;

constexpr Choice<RowResults<T>> FORWARDS[] = {FORWARD<Resident>, FORWARD<Streamed64>, FORWARD<Resident16>,
                                              FORWARD<Streamed16>};
constexpr Choice<RowGradients<T>> BACKWARDS[] = {BACKWARD<Streamed64>, BACKWARD<Streamed16>};

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

using Deep96 = WeightLayout<T, 3, 2, 2>;
using Deep32 = WeightLayout<T, 1, 4, 2>;

// ---- A call ----

// The parameters' type is W.
template <class W>
class Call {
  const SkipAdapter& given;
  const Runtime& runtime;
  const Device device;
  Launches launches;
  Problem<T> problem{};
  int64_t samples;             // that differ
  unsigned parallel_adapters;  // those of a route; adapters of a run come one after another

 public:
  Call(const SkipAdapter& given, const Runtime& runtime) : given(given), runtime(runtime), launches(runtime.stream) {
    const bool apart = given.gates || given.route;
    problem.x = matrix<T>(given.x);
    problem.rows = given.batch * given.rows;
    problem.sample_rows = apart ? given.rows : problem.rows;
    problem.width = static_cast<int>(given.width);
    problem.hidden_width = static_cast<int>(given.hidden_width);
    problem.experts = static_cast<int>(given.experts);
    problem.groups = static_cast<int>(given.groups);
    problem.expert_width = problem.hidden_width / problem.groups;
    problem.adapters = given.route ? 1 : static_cast<int>(given.adapters);
    problem.scale = given.scale;
    problem.gates = given.gates;
    problem.route = given.route;
    problem.seed = given.seed;
    problem.norm = given.norm;
    problem.activation = given.activation;
    problem.residual = given.residual;
    problem.eps = given.eps;
    problem.dropout_threshold = given.dropout_threshold;
    problem.kept_scale = given.kept_scale;
    problem.down_weight = parameters(given.down_weight, given.adapters * given.hidden_width, given.width);
    problem.up_weight = parameters(given.up_weight, given.adapters * given.width, problem.up_depth());
    problem.down_bias = parameters(given.down_bias, given.adapters, given.hidden_width);
    problem.up_bias = parameters(given.up_bias, given.gates ? given.experts : given.adapters, given.width);
    problem.norm_weight = parameters(given.norm_weight, given.adapters, given.width);
    problem.norm_bias = parameters(given.norm_bias, given.adapters, given.width);
    problem.aligned = given.width * sizeof(T) % PIECE_BYTES == 0 && is_aligned(problem.down_weight) &&
                      is_aligned(problem.up_weight) && is_aligned(problem.norm_weight) && is_aligned(problem.norm_bias);
    samples = problem.rows / problem.sample_rows;
    parallel_adapters = given.route ? static_cast<unsigned>(given.adapters) : 1;
  }

  const char* forward(const SkipAdapterResults& results) {
    return error(pass_rows(
        problem, {Purpose::forward, static_cast<T*>(results.output), static_cast<T*>(results.hidden), nullptr}));
  }

  // The rows within a run again, from the hidden layers; then the adapters from the last to the first.
  const char* backward(const SkipAdapterGradients& gradients) {
    const T* const hidden = static_cast<const T*>(gradients.hidden);
    std::vector<Matrix<T>> inputs{problem.x};
    for (int adapter = 0; adapter + 1 < problem.adapters; ++adapter) {
      T* const output = row_scratch();
      if (!pass_rows(single(adapter, inputs.back()), {Purpose::replay, output, const_cast<T*>(hidden), nullptr}))
        return TOO_LITTLE_SHARED_MEMORY;
      inputs.push_back(contiguous<T>(output, problem.rows, problem.width));
    }
    if (given.norm == SkipNorm::layer || given.norm == SkipNorm::rms) sum_weights();
    Matrix<T> grad = matrix<T>(gradients.grad);
    for (int adapter = problem.adapters - 1; adapter >= 0; --adapter) {
      T* const x = adapter > 0 ? row_scratch() : static_cast<T*>(gradients.x);
      if (!differentiate(single(adapter, inputs[adapter]), gradients, grad, x)) return TOO_LITTLE_SHARED_MEMORY;
      grad = contiguous<T>(x, problem.rows, problem.width);
    }
    return launches.error();
  }

 private:
  float* weighted_sums = nullptr;

  template <class E>
  E* scratch(int64_t count) {
    return allocate<E>(runtime, count);
  }
  T* row_scratch() { return scratch<T>(problem.rows * problem.width); }

  const char* error(bool launched) const { return launched ? launches.error() : TOO_LITTLE_SHARED_MEMORY; }

  // float32 beside half activations is rounded first.
  Matrix<T> parameters(const Rows& given_rows, int64_t rows, int64_t width) {
    if (!given_rows.data || std::is_same<T, W>::value) return matrix<T>(given_rows);
    T* const rounded = scratch<T>(rows * width);
    launches.add(round_parameters_kernel, blocks_of(rows * width, ROUNDING_THREADS), ROUNDING_THREADS, 0,
                 matrix<float>(given_rows), rows * width, width, rounded);
    return contiguous<T>(rounded, rows, width);
  }

  // One adapter of a run alone; all of a route.
  Problem<T> single(int adapter, const Matrix<T>& x) const {
    Problem<T> pass = problem;
    pass.x = x;
    pass.first_adapter = adapter;
    pass.adapters = 1;
    return pass;
  }

  int64_t tiles_of_sample(int rows) const { return ceil_div(problem.sample_rows, rows); }

  // No more blocks than run at a time, and as many tiles for each, so that none is left over for a thin last round.
  unsigned row_blocks(int rows, int blocks) const {
    const int64_t tiles = samples * tiles_of_sample(rows);
    return blocks_of(tiles, ceil_div(tiles, int64_t{blocks} * device.multiprocessors));
  }

  // A run stays on chip where its rows do; else its adapters come one after another, from the second on in place. False
  // if the device has too little shared memory.
  bool pass_rows(Problem<T> pass, const RowResults<T>& results) {
    pass.aligned = pass.aligned && is_aligned(pass.x) && is_aligned(contiguous<T>(results.output, 0, 0));
    const auto* choice = choose(FORWARDS, pass, device);
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

  // ---- Backward ----

  void sum_weights() {
    weighted_sums = scratch<float>(given.adapters * 2 * given.hidden_width);
    launches.add(weighted_sums_kernel<T>, dim3(blocks_of(given.hidden_width, SUM_LANES), given.adapters), SUM_THREADS,
                 0, problem, weighted_sums);
  }

  // All of one adapter's gradients, that of its rows to `x` (null: not wanted).
  bool differentiate(Problem<T> pass, const SkipAdapterGradients& wanted, const Matrix<T>& grad, T* x) {
    const bool normed = pass.norm == SkipNorm::layer || pass.norm == SkipNorm::rms;
    const bool norm_wanted = wanted.norm_weight || wanted.norm_bias, dots_wanted = wanted.scale || wanted.gates;
    const auto* choice = choose(BACKWARDS, pass, device);
    if (!choice) return false;
    RowGradients<T> rows{};
    rows.grad = grad;
    rows.derivative = grad;
    if (pass.norm == SkipNorm::layer_after && !derive(pass, wanted, grad, rows.derivative)) return false;
    pass.aligned = pass.aligned && is_aligned(pass.x) && is_aligned(grad) && is_aligned(contiguous<T>(x, 0, 0));
    const int64_t tiles = tiles_of_sample(choice->rows), warps = choice->threads / 32;
    rows.hidden = static_cast<const T*>(wanted.hidden) + pass.first_adapter * pass.rows * pass.hidden_width;
    rows.x = x;
    rows.weighted_sums = weighted_sums;
    rows.up_pitch = pass.groups * group_pitch(pass.up_depth());
    rows.down_pitch = group_pitch(pass.hidden_width);
    const bool down_products = wanted.down_weight || (normed && wanted.norm_weight);
    if (wanted.up_weight) rows.up_operand = scratch<T>(pass.rows * rows.up_pitch);
    if (down_products) rows.down_operand = scratch<T>(pass.rows * rows.down_pitch);
    if (down_products && normed) rows.norms = scratch<RowNorm>(pass.rows);
    if (wanted.down_weight || wanted.down_bias || (normed && norm_wanted))
      rows.hidden_sums = scratch<float>(samples * tiles * choice->row_warps * pass.hidden_width);
    if (dots_wanted) rows.expert_sums = scratch<float>(samples * tiles * warps * pass.experts);
    if (wanted.up_bias || (dots_wanted && pass.up_bias.data))
      rows.result_sums = scratch<float>(samples * tiles * warps * pass.width);
    if (pass.residual == SkipResidual::normed && norm_wanted)
      rows.norm_sums = scratch<float>(samples * tiles * warps * 2 * pass.width);
    launches.add(choice->kernel, row_blocks(choice->rows, choice->blocks), choice->threads, choice->shared_bytes(pass),
                 pass, rows);

    const float* const result_sums = sum_parts(rows.result_sums, tiles * warps, pass.width);
    if (wanted.up_bias)
      vector_gradient(pass, result_sums, pass.width, pass.width, pass.scale, static_cast<W*>(wanted.up_bias), true);
    if (dots_wanted) scalar_gradients(pass, wanted, rows.expert_sums, result_sums, tiles * warps);
    weight_gradients(pass, wanted, rows, tiles, *choice);
    return true;
  }

  // Through the norm after the adapter: its own gradients, and dv in scratch memory.
  bool derive(Problem<T> pass, const SkipAdapterGradients& wanted, const Matrix<T>& grad, Matrix<T>& derivative) {
    T* const output = row_scratch();
    derivative = contiguous<T>(output, pass.rows, pass.width);
    pass.x = grad;
    const auto* choice = choose(FORWARDS, pass, device);
    if (!choice) return false;
    const int64_t parts = tiles_of_sample(choice->rows) * choice->row_warps;
    float* const norm_sums = scratch<float>(samples * parts * 2 * pass.width);
    pass_rows(pass, {Purpose::derive, output, static_cast<T*>(const_cast<void*>(wanted.hidden)), norm_sums});
    const float* const sums = sum_parts(norm_sums, parts, 2 * pass.width);
    if (wanted.norm_weight)
      vector_gradient(pass, sums, pass.width, 2 * pass.width, nullptr, static_cast<W*>(wanted.norm_weight));
    if (wanted.norm_bias)
      vector_gradient(pass, sums + pass.width, pass.width, 2 * pass.width, nullptr, static_cast<W*>(wanted.norm_bias));
    return true;
  }

  // [samples, columns], in scratch memory; null for null.
  const float* sum_parts(const float* parts, int64_t count, int columns) {
    if (!parts) return nullptr;
    float* const sums = scratch<float>(samples * columns);
    launches.add(sum_parts_kernel, dim3(blocks_of(columns, 32), static_cast<unsigned>(samples)), SUM_THREADS,
                 SUM_THREADS * sizeof(float), parts, count, columns, given.route, sums);
    return sums;
  }

  // From samples' sums, `pitch` apart, to a row of `gradient` for each adapter of the pass, or, where the sums are
  // `gated`, for each expert.
  template <class R>
  void vector_gradient(const Problem<T>& pass, const float* sums, int columns, int pitch, const float* scale,
                       R* gradient, bool gated = false) {
    const float* const gates = gated ? pass.gates : nullptr;
    const SampleSums all{sums,       samples, columns, pitch, pass.experts, given.route, gates,
                         scale ? scale + pass.first_adapter : nullptr};
    launches.add(vector_gradient_kernel<R>,
                 dim3(blocks_of(columns, 32), gates ? static_cast<unsigned>(pass.experts) : parallel_adapters),
                 SUM_THREADS, SUM_THREADS * sizeof(float), all, gradient + int64_t{pass.first_adapter} * columns);
  }

  void scalar_gradients(const Problem<T>& pass, const SkipAdapterGradients& wanted, const float* expert_sums,
                        const float* result_sums, int64_t parts) {
    ScalarGradients all{};
    all.expert_sums = expert_sums;
    all.result_sums = pass.up_bias.data ? result_sums : nullptr;
    all.count = parts;
    all.samples = samples;
    all.experts = pass.experts;
    all.width = pass.width;
    all.route = given.route;
    all.gates = pass.gates;
    all.dots = scratch<float>(samples * pass.experts);
    all.gates_gradient = wanted.gates;
    const int shared_bytes = SUM_THREADS / 32 * sizeof(float);
    launches.add(expert_dots_kernel<T>, static_cast<unsigned>(samples), SUM_THREADS, shared_bytes, pass, all);
    if (wanted.scale)
      launches.add(scale_gradient_kernel, parallel_adapters, SUM_THREADS, shared_bytes, all,
                   wanted.scale + pass.first_adapter);
  }

  // W_d, W_u, b_d, and the norm before the adapter.
  void weight_gradients(const Problem<T>& pass, const SkipAdapterGradients& wanted, const RowGradients<T>& rows,
                        int64_t tiles, const Choice<RowGradients<T>>& choice) {
    WeightGradients<T> all{};
    all.route = given.route;
    all.rows = pass.rows;
    all.sample_rows = pass.sample_rows;
    all.width = pass.width;
    const int group_width = pass.width / pass.groups;
    if (rows.up_operand)
      all.wanted[all.tasks++] = {contiguous<T>(rows.up_operand, pass.rows, rows.up_pitch), rows.derivative, nullptr,
                                 pass.groups, pass.up_depth(), group_pitch(pass.up_depth()), group_width,
                                 pass.aligned && group_width % PADDING<T> == 0, nullptr};
    if (rows.down_operand)
      all.wanted[all.tasks++] = {contiguous<T>(rows.down_operand, pass.rows, rows.down_pitch), pass.x, rows.norms,
                                 1, pass.hidden_width, 0, pass.width, pass.aligned, nullptr};
    const int splits = all.tasks ? multiply_rows(all) : 0;
    if (rows.up_operand) {
      const int64_t elements = int64_t{pass.up_depth()} * pass.width;
      launches.add(up_gradient_kernel<W>, dim3(blocks_of(elements, SUM_THREADS), parallel_adapters), SUM_THREADS, 0,
                   all.wanted[0].parts, splits, pass.up_depth(), pass.width,
                   pass.scale ? pass.scale + pass.first_adapter : nullptr,
                   static_cast<W*>(wanted.up_weight) + pass.first_adapter * elements);
    }
    if (!rows.hidden_sums) return;
    const int64_t elements = int64_t{pass.hidden_width} * pass.width;
    const float* const hidden_sums = sum_parts(rows.hidden_sums, tiles * choice.row_warps, pass.hidden_width);
    if (wanted.down_bias)
      vector_gradient(pass, hidden_sums, pass.hidden_width, pass.hidden_width, nullptr,
                      static_cast<W*>(wanted.down_bias));
    const bool normed = pass.norm != SkipNorm::layer_after;
    const float* const norm_sums = sum_parts(rows.norm_sums, tiles * choice.threads / 32, 2 * pass.width);
    const auto of_adapters = [&](const float* sums, int columns) -> const float* {
      if (!sums) return nullptr;
      float* const found = scratch<float>(given.adapters * columns);
      vector_gradient(pass, sums, columns, columns, nullptr, found);
      return found + int64_t{pass.first_adapter} * columns;
    };
    const auto offset = [&](void* gradient, int64_t of_adapter) {
      return gradient ? static_cast<W*>(gradient) + pass.first_adapter * of_adapter : nullptr;
    };
    const DownGradient<T, W> down{rows.down_operand ? all.wanted[all.tasks - 1].parts : nullptr,
                                  of_adapters(hidden_sums, pass.hidden_width),
                                  rows.down_operand ? splits : 0,
                                  pass.first_adapter,
                                  offset(wanted.down_weight, elements),
                                  offset(normed ? wanted.norm_weight : nullptr, pass.width),
                                  offset(normed ? wanted.norm_bias : nullptr, pass.width),
                                  of_adapters(norm_sums, 2 * pass.width)};
    launches.add(down_gradient_kernel<T, W>, dim3(blocks_of(pass.width, 32), parallel_adapters), SUM_THREADS,
                 SUM_THREADS * sizeof(float), pass, down);
  }

  // Allocates the parts and computes them; returns how many splits of the rows there are: as many as give every
  // multiprocessor two blocks.
  int multiply_rows(WeightGradients<T>& all) {
    int64_t depth = 0, tiles = 0;
    for (int i = 0; i < all.tasks; ++i) depth = std::max(depth, int64_t{all.wanted[i].depth});
    const bool deep = depth > 64;
    for (int i = 0; i < all.tasks; ++i) {
      const auto& task = all.wanted[i];
      tiles = std::max(tiles, ceil_div(task.depth, deep ? Deep96::DEPTH : Deep32::DEPTH) * task.groups *
                                  ceil_div(task.group_width, CHUNK<T>));
    }
    const int64_t steps = samples * ceil_div(all.sample_rows, SPLIT_STEP);
    const int64_t blocks = tiles * all.tasks * parallel_adapters;
    const int64_t wanted_splits = std::min(steps, ceil_div(2 * device.multiprocessors, blocks));
    all.split_steps = ceil_div(steps, wanted_splits);
    const int64_t splits = ceil_div(steps, all.split_steps);
    for (int i = 0; i < all.tasks; ++i)
      all.wanted[i].parts = scratch<float>(parallel_adapters * splits * all.wanted[i].depth * all.width);
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(splits), all.tasks * parallel_adapters);
    if (deep)
      launches.add(weight_gradients_kernel<T, Deep96>, grid, Deep96::THREADS, Deep96::shared_bytes(), all);
    else
      launches.add(weight_gradients_kernel<T, Deep32>, grid, Deep32::THREADS, Deep32::shared_bytes(), all);
    return static_cast<int>(splits);
  }
};

const char* forward(const SkipAdapter& given, const SkipAdapterResults& results, const Runtime& runtime) {
  return given.float_weights ? Call<float>(given, runtime).forward(results) : Call<T>(given, runtime).forward(results);
}

const char* backward(const SkipAdapter& given, const SkipAdapterGradients& gradients, const Runtime& runtime) {
  return given.float_weights ? Call<float>(given, runtime).backward(gradients)
                             : Call<T>(given, runtime).backward(gradients);
}

}  // namespace

extern const SkipAdapterKernels skip_adapter{forward, backward};

}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
