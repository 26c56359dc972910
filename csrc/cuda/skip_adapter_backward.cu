// The backward of skip_adapter; skip_adapter.cu says how its work is laid out. Compiled once per type of the
// activations, as the forward is.

#include "skip_adapter_backward.cuh"

#include <vector>

#include "skip_adapter_call.cuh"
#include "skip_adapter_weights.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {
namespace {

template <class L>
constexpr Choice<RowGradients<T>> BACKWARD = {L::ROWS,       L::RESIDENT, L::BLOCKS,
                                              L::THREADS,    L::ROW_WARPS, backward_shared_bytes<T, L>,
                                              backward_kernel<T, L>};

constexpr Choice<RowGradients<T>> BACKWARDS[] = {BACKWARD<Streamed64>, BACKWARD<Streamed16>};

using Deep96 = WeightLayout<T, 3, 2, 2>;
using Deep32 = WeightLayout<T, 1, 4, 2>;

// The parameters' type is W.
template <class W>
class Backward : SkipAdapterCall {
 public:
  using SkipAdapterCall::SkipAdapterCall;

  // The rows within a run again, from the hidden layers; then the adapters from the last to the first.
  const char* run(const SkipAdapterGradients& gradients) {
    const T* const hidden = static_cast<const T*>(gradients.hidden);
    std::vector<Matrix<T>> inputs{problem.x};
    for (int adapter = 0; adapter + 1 < problem.adapters; ++adapter) {
      T* const output = row_scratch();
      if (!pass_rows(single(adapter, inputs.back()), {Purpose::replay, output, const_cast<T*>(hidden), nullptr}))
        return TOO_LITTLE_SHARED_MEMORY;
      inputs.push_back(contiguous<T>(output, problem.rows, problem.width));
    }
    if (given.norm == SkipNorm::LAYER || given.norm == SkipNorm::RMS) sum_weights();
    Matrix<T> grad = matrix<T>(gradients.grad);
    for (int adapter = problem.adapters - 1; adapter >= 0; --adapter) {
      T* const x = adapter > 0 ? row_scratch() : data_of<T>(gradients.x);
      if (!differentiate(single(adapter, inputs[adapter]), gradients, grad, x)) return TOO_LITTLE_SHARED_MEMORY;
      grad = contiguous<T>(x, problem.rows, problem.width);
    }
    return launches.error();
  }

 private:
  float* weighted_sums = nullptr;

  T* row_scratch() { return scratch<T>(problem.rows * problem.width); }

  // One adapter of a run alone; all of a route.
  Problem<T> single(int adapter, const Matrix<T>& x) const {
    Problem<T> pass = problem;
    pass.x = x;
    pass.first_adapter = adapter;
    pass.adapters = 1;
    return pass;
  }

  void sum_weights() {
    weighted_sums = scratch<float>(given.adapters * 2 * given.adapter_width);
    launches.add(weighted_sums_kernel<T>, dim3(blocks_of(given.adapter_width, SUM_LANES), given.adapters), SUM_THREADS,
                 0, problem, weighted_sums);
  }

  // All of one adapter's gradients, that of its rows to `x` (null: not wanted).
  bool differentiate(Problem<T> pass, const SkipAdapterGradients& wanted, const Matrix<T>& grad, T* x) {
    const bool normed = pass.norm == SkipNorm::LAYER || pass.norm == SkipNorm::RMS;
    const bool norm_wanted = wanted.norm_weight.data || wanted.norm_bias.data, dots_wanted = wanted.scale || wanted.gates;
    const auto* choice = choose(BACKWARDS, pass, device);
    if (!choice) return false;
    RowGradients<T> rows{};
    rows.grad = grad;
    rows.derivative = grad;
    if (pass.norm == SkipNorm::LAYER_AFTER && !derive(pass, wanted, grad, rows.derivative)) return false;
    pass.aligned = pass.aligned && is_aligned(pass.x) && is_aligned(grad) && is_aligned(contiguous<T>(x, 0, 0));
    const int64_t tiles = tiles_of_sample(choice->rows), warps = choice->threads / 32;
    rows.hidden = static_cast<const T*>(wanted.hidden) + pass.first_adapter * pass.rows * pass.adapter_width;
    rows.x = x;
    rows.weighted_sums = weighted_sums;
    rows.up_pitch = pass.groups * group_pitch(pass.up_depth());
    rows.down_pitch = group_pitch(pass.adapter_width);
    const bool down_products = wanted.down_weight.data || (normed && wanted.norm_weight.data);
    if (wanted.up_weight.data) rows.up_operand = scratch<T>(pass.rows * rows.up_pitch);
    if (down_products) rows.down_operand = scratch<T>(pass.rows * rows.down_pitch);
    if (down_products && normed) rows.norms = scratch<RowNorm>(pass.rows);
    if (wanted.down_weight.data || wanted.down_bias.data || (normed && norm_wanted))
      rows.hidden_sums = scratch<float>(samples * tiles * choice->row_warps * pass.adapter_width);
    if (dots_wanted) rows.expert_sums = scratch<float>(samples * tiles * warps * pass.experts);
    if (wanted.up_bias.data || (dots_wanted && pass.up_bias.data))
      rows.result_sums = scratch<float>(samples * tiles * warps * pass.width);
    if (pass.residual == SkipResidual::NORMED && norm_wanted)
      rows.norm_sums = scratch<float>(samples * tiles * warps * 2 * pass.width);
    launches.add(choice->kernel, row_blocks(choice->rows, choice->blocks), choice->threads, choice->shared_bytes(pass),
                 pass, rows);

    const float* const result_sums = sum_parts(rows.result_sums, tiles * warps, pass.width);
    if (wanted.up_bias.data)
      vector_gradient(pass, result_sums, pass.width, pass.width, pass.scale, data_of<W>(wanted.up_bias), true);
    if (dots_wanted) scalar_gradients(pass, wanted, rows.expert_sums, result_sums, tiles * warps);
    weight_gradients(pass, wanted, rows, tiles, *choice);
    return true;
  }

  // Through the norm after the adapter: its own gradients, and dv in scratch memory.
  bool derive(Problem<T> pass, const SkipAdapterGradients& wanted, const Matrix<T>& grad, Matrix<T>& derivative) {
    T* const output = row_scratch();
    derivative = contiguous<T>(output, pass.rows, pass.width);
    pass.x = grad;
    const auto* choice = choose_forward(pass);
    if (!choice) return false;
    const int64_t parts = tiles_of_sample(choice->rows) * choice->row_warps;
    float* const norm_sums = scratch<float>(samples * parts * 2 * pass.width);
    pass_rows(pass, {Purpose::derive, output, static_cast<T*>(const_cast<void*>(wanted.hidden)), norm_sums});
    const float* const sums = sum_parts(norm_sums, parts, 2 * pass.width);
    if (wanted.norm_weight.data)
      vector_gradient(pass, sums, pass.width, 2 * pass.width, nullptr, data_of<W>(wanted.norm_weight));
    if (wanted.norm_bias.data)
      vector_gradient(pass, sums + pass.width, pass.width, 2 * pass.width, nullptr, data_of<W>(wanted.norm_bias));
    return true;
  }

  // [samples, columns], in scratch memory; null for null.
  const float* sum_parts(const float* parts, int64_t count, int columns) {
    if (!parts) return nullptr;
    float* const sums = scratch<float>(samples * columns);
    launches.add(sum_parts_kernel, dim3(static_cast<unsigned>(samples), blocks_of(columns, 32)), SUM_THREADS,
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
    const int group_width = pass.group_width;
    if (rows.up_operand)
      all.wanted[all.tasks++] = {contiguous<T>(rows.up_operand, pass.rows, rows.up_pitch), rows.derivative, nullptr,
                                 pass.groups, pass.up_depth(), group_pitch(pass.up_depth()), group_width,
                                 pass.aligned && group_width % PADDING<T> == 0, nullptr};
    if (rows.down_operand)
      all.wanted[all.tasks++] = {contiguous<T>(rows.down_operand, pass.rows, rows.down_pitch), pass.x, rows.norms,
                                 1, pass.adapter_width, 0, pass.width, pass.aligned, nullptr};
    const int splits = all.tasks ? multiply_rows(all) : 0;
    if (rows.up_operand) {
      const int64_t elements = int64_t{pass.up_depth()} * pass.width;
      launches.add(up_gradient_kernel<W>, dim3(blocks_of(elements, SUM_THREADS), parallel_adapters), SUM_THREADS, 0,
                   all.wanted[0].parts, splits, pass.up_depth(), pass.width,
                   pass.scale ? pass.scale + pass.first_adapter : nullptr,
                   data_of<W>(wanted.up_weight) + pass.first_adapter * elements);
    }
    if (!rows.hidden_sums) return;
    const int64_t elements = int64_t{pass.adapter_width} * pass.width;
    const float* const hidden_sums = sum_parts(rows.hidden_sums, tiles * choice.row_warps, pass.adapter_width);
    if (wanted.down_bias.data)
      vector_gradient(pass, hidden_sums, pass.adapter_width, pass.adapter_width, nullptr,
                      data_of<W>(wanted.down_bias));
    const bool normed = pass.norm != SkipNorm::LAYER_AFTER;
    const float* const norm_sums = sum_parts(rows.norm_sums, tiles * choice.threads / 32, 2 * pass.width);
    const auto of_adapters = [&](const float* sums, int columns) -> const float* {
      if (!sums) return nullptr;
      float* const found = scratch<float>(given.adapters * columns);
      vector_gradient(pass, sums, columns, columns, nullptr, found);
      return found + int64_t{pass.first_adapter} * columns;
    };
    const auto offset = [&](const Rows& gradient, int64_t of_adapter) {
      return gradient.data ? data_of<W>(gradient) + pass.first_adapter * of_adapter : nullptr;
    };
    const DownGradient<T, W> down{rows.down_operand ? all.wanted[all.tasks - 1].parts : nullptr,
                                  of_adapters(hidden_sums, pass.adapter_width),
                                  rows.down_operand ? splits : 0,
                                  pass.first_adapter,
                                  offset(wanted.down_weight, elements),
                                  offset(normed ? wanted.norm_weight : Rows{}, pass.width),
                                  offset(normed ? wanted.norm_bias : Rows{}, pass.width),
                                  of_adapters(norm_sums, 2 * pass.width)};
    launches.add(down_gradient_kernel<T, W>, dim3(blocks_of(pass.width, 32), parallel_adapters), SUM_THREADS,
                 SUM_THREADS * sizeof(float), pass, down);
  }

  // Allocates the parts and computes them; returns how many splits of the rows there are. Every multiprocessor runs two
  // blocks at a time.
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
    all.split_steps = ceil_div(steps, count_splits(blocks, 2 * device.multiprocessors, steps));
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

}  // namespace

const char* skip_adapter_backward(const SkipAdapter& given, const SkipAdapterGradients& gradients,
                                  const Runtime& runtime) {
  return given.down_weight.dtype == Dtype::FLOAT32 ? Backward<float>(given, runtime).run(gradients)
                             : Backward<T>(given, runtime).run(gradients);
}

}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
