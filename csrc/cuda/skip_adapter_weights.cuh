// The gradients of skip_adapter's parameters, once the row tiles are done: products over all rows, in splits, and the
// sums of these and of the row tiles' parts, in a fixed order. skip_adapter.cu says how the work is laid out.

#pragma once

#include "skip_adapter_rows.cuh"

namespace fast_prompt::cuda::skip {
namespace {

// ---- sum over rows of operand (x) activations: parts of the sums ----

constexpr int SPLIT_STEP = 64;  // rows of a stage

// One of the two: t and dv for W_u, dh and norm(x), without the norm's weight and bias, for W_d. Of each group of
// activations the gradient is [depth, group_width]; its operand columns are group_pitch apart.
template <class T>
struct WeightGradient {
  Matrix<T> operand, activations;
  const RowNorm* norms;  // of the activations' rows; null for none
  int groups, depth, group_pitch, group_width;
  bool aligned;
  float* parts;  // [adapters, splits, depth, width]
};

template <class T>
struct WeightGradients {
  WeightGradient<T> wanted[2];
  int tasks;
  const int64_t* route;
  int64_t rows, sample_rows, split_steps;
  int width;
};

// ROW_WARPS x COLUMN_WARPS warps take [DEPTH, CHUNK] of the gradient, each [16 M, 8 N] of it.
template <class T, int ROW_WARPS_, int COLUMN_WARPS_, int M_>
struct WeightLayout {
  static constexpr int ROW_WARPS = ROW_WARPS_, COLUMN_WARPS = COLUMN_WARPS_, M = M_;
  static constexpr int N = CHUNK<T> / COLUMN_WARPS / 8, THREADS = 32 * ROW_WARPS * COLUMN_WARPS;
  static constexpr int DEPTH = ROW_WARPS * M * 16, OPERAND_PITCH = DEPTH + 8;
  static constexpr int STAGE = SPLIT_STEP * (OPERAND_PITCH + PITCH<T>);
  // Within the 99 KiB that a block may have on the smallest chips (sm_86, sm_89, sm_120).
  static constexpr int STAGES = 3 * STAGE * sizeof(T) <= 99 << 10 ? 3 : 2;
  static constexpr int64_t shared_bytes() { return int64_t{STAGES} * STAGE * sizeof(T); }
};

// The steps of a split, of SPLIT_STEP rows each: none has rows of two samples that differ, and only the samples of
// `adapter` count.
template <class T>
class RowSteps {
  const WeightGradients<T>* all;
  int64_t steps_per_sample, step, end, adapter;

 public:
  int64_t first_row = 0, end_row = 0;

  __device__ RowSteps(const WeightGradients<T>& all, int64_t split, int64_t adapter)
      : all(&all), steps_per_sample(ceil_div(all.sample_rows, SPLIT_STEP)), adapter(adapter) {
    const int64_t steps = all.rows / all.sample_rows * steps_per_sample;
    step = split * all.split_steps;
    end = step + all.split_steps < steps ? step + all.split_steps : steps;
    settle();
  }

  __device__ bool exists() const { return step < end; }

  __device__ void advance() {
    ++step;
    settle();
  }

 private:
  __device__ void settle() {
    while (exists() && all->route && all->route[step / steps_per_sample] != adapter) ++step;
    const int64_t sample = step / steps_per_sample;
    first_row = sample * all->sample_rows + step % steps_per_sample * SPLIT_STEP;
    end_row = (sample + 1) * all->sample_rows;
  }
};

// A tile of activations becomes what a norm makes of it, without the norm's weight and bias.
template <class T, class L>
__device__ inline void normalize_tile(T* tile, const RowNorm* norms, const RowSteps<T>& step, int first_column,
                                      int width) {
  for_each_piece<T, SPLIT_STEP, CHUNK<T>, L::THREADS>(
      threadIdx.x, step.first_row, step.end_row, first_column, width, [&](int row, int column, int count) {
        if (count == 0) return;
        const RowNorm norm = norms[step.first_row + row];
        auto& piece = *reinterpret_cast<Piece<T>*>(tile + row * PITCH<T> + column);
#pragma unroll
        for (int i = 0; i < PADDING<T>; ++i) assign(piece.element[i], norm(to_float(piece.element[i])));
      });
  __syncthreads();
}

// Grid: x the [DEPTH, CHUNK] tiles of the gradient that has most, y the splits, z which gradient of which adapter.
template <class T, class L>
__global__ void __launch_bounds__(L::THREADS, 2)
    weight_gradients_kernel(const __grid_constant__ WeightGradients<T> all) {
  const WeightGradient<T>& task = all.wanted[blockIdx.z % all.tasks];
  const int64_t adapter = blockIdx.z / all.tasks;
  T* const stages = reinterpret_cast<T*>(ptx::dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int chunks = static_cast<int>(ceil_div(task.group_width, CHUNK<T>));
  const int group = blockIdx.x / chunks % task.groups, first_depth = blockIdx.x / chunks / task.groups * L::DEPTH;
  if (first_depth >= task.depth) return;
  const int group_column = group * task.group_width, end_column = group_column + task.group_width;
  const int first_column = group_column + blockIdx.x % chunks * CHUNK<T>;
  const int first_operand = group * task.group_pitch;
  const int warp_depth = warp / L::COLUMN_WARPS * L::M * 16, warp_column = warp % L::COLUMN_WARPS * L::N * 8;

  RowSteps<T> step(all, blockIdx.y, adapter), next_step = step;
  int free_stage = 0, ready_stage = 0;
  const auto load_next = [&] {
    if (next_step.exists()) {
      T* operand = stages + free_stage * L::STAGE;
      load_tile<SPLIT_STEP, L::DEPTH, L::THREADS>(operand, L::OPERAND_PITCH, unbroken(task.operand),
                                                  next_step.first_row, next_step.end_row, first_operand + first_depth,
                                                  first_operand + task.depth, true);
      load_tile<SPLIT_STEP, CHUNK<T>, L::THREADS>(operand + SPLIT_STEP * L::OPERAND_PITCH, PITCH<T>, task.activations,
                                                  next_step.first_row, next_step.end_row, first_column, end_column,
                                                  task.aligned);
      next_step.advance();
    }
    ptx::copy_commit();
    free_stage = (free_stage + 1) % L::STAGES;
  };
#pragma unroll 1
  for (int i = 0; i < L::STAGES - 1; ++i) load_next();

  Sums<L::M, L::N> sums;
  for (; step.exists(); step.advance()) {
    ptx::copy_wait<L::STAGES - 2>();
    __syncthreads();
    load_next();
    const T* operand = stages + ready_stage * L::STAGE;
    T* activations = stages + ready_stage * L::STAGE + SPLIT_STEP * L::OPERAND_PITCH;
    ready_stage = (ready_stage + 1) % L::STAGES;
    if (task.norms) normalize_tile<T, L>(activations, task.norms, step, first_column, end_column);
#pragma unroll 1
    for (int k = 0; k < SPLIT_STEP; k += 16)
      multiply_transposed(sums, operand + k * L::OPERAND_PITCH + warp_depth, L::OPERAND_PITCH,
                          activations + k * PITCH<T> + warp_column, PITCH<T>, lane);
  }
  ptx::copy_wait<0>();

  float* const parts = task.parts + (adapter * gridDim.y + blockIdx.y) * task.depth * all.width;
  for_each_pair(sums, lane % 4, [&](float first, float second, int slot, int pair_column) {
    const int depth = first_depth + warp_depth + slot / 2 * 16 + slot % 2 * 8 + lane / 4;
    const int column = first_column + warp_column + pair_column;
    if (depth >= task.depth) return;
    if (column < end_column) parts[int64_t{depth} * all.width + column] = first;
    if (column + 1 < end_column) parts[int64_t{depth} * all.width + column + 1] = second;
  });
}

// ---- The parts, added up in a fixed order ----

// Blocks of these kernels have 32 columns, each by SUM_LANES threads.
constexpr int SUM_LANES = 8, SUM_THREADS = 32 * SUM_LANES;

struct SumPlace {
  int column = threadIdx.x % 32, lane = threadIdx.x / 32;

  // Of the column's threads; all get it. `exchange` holds a float for each thread.
  __device__ float add(float value, float* exchange) const {
    __syncthreads();
    exchange[threadIdx.x] = value;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < SUM_LANES; ++i) sum += exchange[i * 32 + column];
    return sum;
  }
};

// sums [samples, columns] of parts [samples, count, columns]. Grid: x the samples, which may be many, y the columns.
__global__ void __launch_bounds__(SUM_THREADS)
    sum_parts_kernel(const float* parts, int64_t count, int columns, const int64_t* route, float* sums) {
  const SumPlace place;
  const int64_t sample = blockIdx.x;
  const int column = blockIdx.y * 32 + place.column;
  if (route && route[sample] < 0) return;
  float sum = 0;
  if (column < columns)
    for (int64_t i = place.lane; i < count; i += SUM_LANES) sum += parts[(sample * count + i) * columns + column];
  sum = place.add(sum, reinterpret_cast<float*>(ptx::dynamic_shared()));
  if (place.lane == 0 && column < columns) sums[sample * columns + column] = sum;
}

// How samples' sums make up the gradient of a vector of parameters: those of each adapter's samples, or with gates all
// of them for each expert, times its gate.
struct SampleSums {
  const float* sums;  // [samples, pitch]
  int64_t samples;
  int columns, pitch, experts;
  const int64_t* route;
  const float *gates, *scale;  // null for 1
};

// gradient [adapters or experts, columns]. Grid: x the columns, y the adapters or experts.
template <class W>
__global__ void __launch_bounds__(SUM_THREADS)
    vector_gradient_kernel(const __grid_constant__ SampleSums all, W* gradient) {
  const SumPlace place;
  const int column = blockIdx.x * 32 + place.column, index = blockIdx.y;
  float sum = 0;
  if (column < all.columns)
    for (int64_t sample = place.lane; sample < all.samples; sample += SUM_LANES)
      if (!all.route || all.route[sample] == index)
        sum += (all.gates ? all.gates[sample * all.experts + index] : 1) * all.sums[sample * all.pitch + column];
  sum = place.add(sum, reinterpret_cast<float*>(ptx::dynamic_shared()));
  const float scale = all.scale ? all.scale[all.gates ? 0 : index] : 1;
  if (place.lane == 0 && column < all.columns) assign(gradient[int64_t{index} * all.columns + column], scale * sum);
}

// The gradient of the up weight, [adapters, width, depth]: the splits' sum times the scale. Grid: x the elements, y the
// adapters.
template <class W>
__global__ void __launch_bounds__(SUM_THREADS)
    up_gradient_kernel(const float* parts, int splits, int depth, int width, const float* scale, W* gradient) {
  const int64_t elements = int64_t{depth} * width, i = int64_t{blockIdx.x} * SUM_THREADS + threadIdx.x;
  if (i >= elements) return;
  float sum = 0;
  for (int split = 0; split < splits; ++split) sum += parts[(blockIdx.y * int64_t{splits} + split) * elements + i];
  const float factor = scale ? scale[blockIdx.y] : 1;
  assign(gradient[blockIdx.y * elements + i % width * depth + i / width], factor * sum);
}

// What follows from the products P = sum over rows of dh (x) xhat and from dh's sums, with the norm before the adapter
// z = weight * xhat + bias: dW_d = P weight + dh bias, and for the norm itself sum_j W_d P and sum_j W_d dh.
template <class T, class W>
struct DownGradient {
  const float* parts;        // [adapters, splits, adapter_width, width]
  const float* hidden_sums;  // [adapters, adapter_width], of dh
  int splits, first_adapter;
  W *down_weight, *norm_weight, *norm_bias;  // null where not wanted
  // Where the normed rows are added to the result, the sums of grad * xhat and of grad: [adapters, 2, width]; else
  // null.
  const float* norm_sums;
};

// Grid: x the columns, y the adapters.
template <class T, class W>
__global__ void __launch_bounds__(SUM_THREADS)
    down_gradient_kernel(const __grid_constant__ Problem<T> problem, const __grid_constant__ DownGradient<T, W> all) {
  const SumPlace place;
  const int column = blockIdx.x * 32 + place.column;
  const int64_t index = blockIdx.y, adapter = all.first_adapter + index;
  const int64_t elements = int64_t{problem.adapter_width} * problem.width;
  const bool inside = column < problem.width, normed = problem.normed_before();
  const float weight = inside && normed ? problem.at(problem.norm_weight, adapter, column) : 1;
  const float bias = inside && normed ? problem.at(problem.norm_bias, adapter, column) : 0;
  float of_weight = 0, of_bias = 0;
  for (int j = place.lane; inside && j < problem.adapter_width; j += SUM_LANES) {
    const int64_t element = int64_t{j} * problem.width + column;
    float product = 0;
    for (int split = 0; split < all.splits; ++split)
      product += all.parts[(index * all.splits + split) * elements + element];
    const float hidden_sum = all.hidden_sums[index * problem.adapter_width + j];
    const int64_t row = adapter * problem.adapter_width + j;
    const float down = to_float(problem.down_weight.data[problem.down_weight.offset(row) + column]);
    if (all.down_weight) assign(all.down_weight[index * elements + element], product * weight + hidden_sum * bias);
    of_weight += down * product;
    of_bias += down * hidden_sum;
  }
  float* const exchange = reinterpret_cast<float*>(ptx::dynamic_shared());
  of_weight = place.add(of_weight, exchange);
  of_bias = place.add(of_bias, exchange);
  if (place.lane != 0 || !inside) return;
  const float* const of_grad = all.norm_sums ? all.norm_sums + index * 2 * problem.width + column : nullptr;
  if (all.norm_weight)
    assign(all.norm_weight[index * problem.width + column], of_weight + (of_grad ? of_grad[0] : 0));
  if (all.norm_bias)
    assign(all.norm_bias[index * problem.width + column], of_bias + (of_grad ? of_grad[problem.width] : 0));
}

// For each adapter and hidden column j: sum_k W_d[j, k] weight[k], and b_d[j] + sum_k W_d[j, k] bias[k] of the norm. A
// warp for each; grid: x the hidden columns, y the adapters.
template <class T>
__global__ void __launch_bounds__(SUM_THREADS)
    weighted_sums_kernel(const __grid_constant__ Problem<T> problem, float* sums) {
  const int lane = threadIdx.x % 32, j = blockIdx.x * SUM_LANES + threadIdx.x / 32;
  const int64_t adapter = blockIdx.y;
  if (j >= problem.adapter_width) return;
  const T* const row = problem.down_weight.data + problem.down_weight.offset(adapter * problem.adapter_width + j);
  float weight = 0, bias = 0;
  for (int k = lane; k < problem.width; k += 32) {
    weight += to_float(row[k]) * problem.at(problem.norm_weight, adapter, k);
    bias += to_float(row[k]) * problem.at(problem.norm_bias, adapter, k);
  }
  weight = reduce_lanes<31>(weight, Add());
  bias = reduce_lanes<31>(bias, Add());
  if (lane != 0) return;
  sums[(2 * adapter) * problem.adapter_width + j] = weight;
  sums[(2 * adapter + 1) * problem.adapter_width + j] = bias + problem.at(problem.down_bias, adapter, j);
}

// ---- Gates and scales ----

struct ScalarGradients {
  const float* expert_sums;  // [samples, count, experts]: parts of dv . W_u t
  const float* result_sums;  // [samples, width]: of dv; null without a bias
  int64_t count, samples;
  int experts, width;
  const int64_t* route;
  const float *gates, *scale;
  float* dots;            // [samples, experts]: dv . (W_u t + b_u)
  float* gates_gradient;  // [samples, experts]; null where not wanted
};

// A block for each sample. In a launch of several adapters, a sample's is in the route.
template <class T>
__global__ void __launch_bounds__(SUM_THREADS)
    expert_dots_kernel(const __grid_constant__ Problem<T> problem, const __grid_constant__ ScalarGradients all) {
  const int64_t sample = blockIdx.x;
  const int64_t adapter = all.route ? all.route[sample] : problem.first_adapter;
  if (adapter < 0) return;
  for (int expert = 0; expert < all.experts; ++expert) {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < all.count; i += SUM_THREADS)
      sum += all.expert_sums[(sample * all.count + i) * all.experts + expert];
    for (int column = threadIdx.x; all.result_sums && column < all.width; column += SUM_THREADS)
      sum += all.result_sums[sample * all.width + column] *
             problem.at(problem.up_bias, all.gates ? expert : adapter, column);
    __syncthreads();
    sum = reduce_block<SUM_THREADS>(sum, reinterpret_cast<float*>(ptx::dynamic_shared()), Add());
    if (threadIdx.x != 0) continue;
    all.dots[sample * all.experts + expert] = sum;
    if (all.gates_gradient) all.gates_gradient[sample * all.experts + expert] = problem.scale_of(0) * sum;
  }
}

// The gradients of the scales; a block for each adapter.
__global__ void __launch_bounds__(SUM_THREADS)
    scale_gradient_kernel(const __grid_constant__ ScalarGradients all, float* gradient) {
  float sum = 0;
  for (int64_t i = threadIdx.x; i < all.samples * all.experts; i += SUM_THREADS)
    if (!all.route || all.route[i / all.experts] == blockIdx.x) sum += (all.gates ? all.gates[i] : 1) * all.dots[i];
  sum = reduce_block<SUM_THREADS>(sum, reinterpret_cast<float*>(ptx::dynamic_shared()), Add());
  if (threadIdx.x == 0) gradient[blockIdx.x] = sum;
}

}  // namespace
}  // namespace fast_prompt::cuda::skip
