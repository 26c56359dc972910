// The backward's kernels of prompt_compress that go over samples and rows (sample, head, query) alone.

#pragma once

#include "prompt_compress_tokens.cuh"

namespace fast_prompt::cuda::compress {
namespace {

// A power of two for each sample, near its gradient's largest value, by which everything that comes of the gradient is
// divided until it is float32 again: fp16 neither overflows nor underflows. A block for each sample.
template <class T>
__global__ void __launch_bounds__(ROW_THREADS)
    units_kernel(const __grid_constant__ Matrix<T> grad, int64_t queries, int inner_width, float* units,
                 float* per_units) {
  float largest = 0;
  for (int64_t query = 0; query < queries; ++query) {
    const T* const row = grad.data + grad.offset(blockIdx.x * queries + query);
    for (int i = threadIdx.x; i < inner_width; i += ROW_THREADS)
      largest = ptx::max_or_nan(largest, fabsf(to_float(row[i])));
  }
  largest = reduce_block<ROW_THREADS>(largest, reinterpret_cast<float*>(ptx::dynamic_shared()), Larger());
  if (threadIdx.x != 0) return;
  units[blockIdx.x] = unit_of(largest);
  per_units[blockIdx.x] = 1 / unit_of(largest);
}

template <class T, class W>
struct MomentsOf {
  Matrix<T> grad;
  const W* value_bias;  // or null
  const float* per_units;
  int heads, head_width, queries;
  const float *probabilities, *attended;  // [batch * rows, tokens], [batch * rows, width]
  float* weight_sums;                     // [batch * rows], of the probabilities after dropout
  RowMoments* moments;                    // [batch * rows]
};

// A warp for each row. `pass` has dY for its operand; probabilities and attended are the forward's.
template <class T, class W>
__global__ void __launch_bounds__(ROW_THREADS)
    moments_kernel(const __grid_constant__ TokenPass<T> pass, const __grid_constant__ MomentsOf<T, W> all) {
  const int64_t row = int64_t{blockIdx.x} * (ROW_THREADS / 32) + threadIdx.x / 32;
  if (row >= pass.batch * pass.rows) return;
  const int lane = threadIdx.x % 32, row_of_sample = static_cast<int>(row % pass.rows);
  const int64_t sample = row / pass.rows;
  float weight_sum = 0, bias = 0, mean = 0;
  for (int token = lane; token < pass.tokens; token += 32)
    if (keeps(pass, row, token)) weight_sum += all.probabilities[row * pass.tokens + token];
  weight_sum = pass.kept_scale * reduce_lanes<31>(weight_sum, Add());

  if (all.value_bias) {
    const int head = row_of_sample / all.queries, query = row_of_sample % all.queries;
    const T* const grad = all.grad.data + all.grad.offset(sample * all.queries + query) + head * all.head_width;
    for (int i = lane; i < all.head_width; i += 32)
      bias += to_float(grad[i]) * to_float(all.value_bias[head * all.head_width + i]);
    bias = reduce_lanes<31>(bias, Add()) * all.per_units[sample];
  }

  const T* const derivative = pass.operand + sample * pass.operand_stride + int64_t{row_of_sample} * pass.operand_pitch;
  for (int i = lane; i < pass.width; i += 32) mean += to_float(derivative[i]) * all.attended[row * pass.width + i];
  mean = reduce_lanes<31>(mean, Add()) + bias * weight_sum;
  if (lane != 0) return;
  all.weight_sums[row] = weight_sum;
  all.moments[row] = {bias, mean};
}

// sums = unit * the parts' sum, [batch, elements].
__global__ void __launch_bounds__(ROW_THREADS)
    sum_splits_kernel(const float* parts, int splits, int64_t batch, int64_t elements, const float* units,
                      float* sums) {
  const int64_t i = int64_t{blockIdx.x} * ROW_THREADS + threadIdx.x;
  if (i >= batch * elements) return;
  float sum = 0;
  for (int split = 0; split < splits; ++split) sum += parts[split * batch * elements + i];
  sums[i] = units[i / elements] * sum;
}

}  // namespace
}  // namespace fast_prompt::cuda::compress
