// The kernels of prompt_compress that go over rows (sample, head, query) alone: sums of splits, and what they make of
// them.

#pragma once

#include "prompt_compress_tokens.cuh"

namespace fast_prompt::cuda {
namespace {

constexpr int ROW_THREADS = 128;

// ---- Forward: the splits of a row become one ----

struct Combination {
  const float* parts;       // [splits, rows, width]
  const RowSums* row_sums;  // [splits, rows]
  int64_t rows;
  int splits, tokens, width;
  float kept_scale;
};

// A block for each row. weight_sums are of the probabilities after dropout; probabilities, which may be null, hold the
// scores at first.
__global__ void __launch_bounds__(ROW_THREADS)
    combine_kernel(const __grid_constant__ Combination all, float* attended, float* logsumexp, float* weight_sums,
                   float* probabilities) {
  const int64_t row = blockIdx.x;
  float largest = -INFINITY;
  for (int split = 0; split < all.splits; ++split)
    largest = ptx::max_or_nan(largest, all.row_sums[split * all.rows + row].largest);
  const bool empty = largest == -INFINITY;  // padding alone
  const float shift = empty ? 0 : largest;
  float sum = 0, kept = 0;
  for (int split = 0; split < all.splits; ++split) {
    const RowSums sums = all.row_sums[split * all.rows + row];
    const float weight = expf(sums.largest - shift);
    sum += weight * sums.all;
    kept += weight * sums.kept;
  }
  const float per_sum = empty ? 0 : 1 / sum;
  for (int column = threadIdx.x; column < all.width; column += ROW_THREADS) {
    float weighted = 0;
    for (int split = 0; split < all.splits; ++split)
      weighted += expf(all.row_sums[split * all.rows + row].largest - shift) *
                  all.parts[(split * all.rows + row) * all.width + column];
    attended[row * all.width + column] = weighted * per_sum * all.kept_scale;
  }
  if (probabilities)
    for (int token = threadIdx.x; token < all.tokens; token += ROW_THREADS) {
      float& element = probabilities[row * all.tokens + token];
      element = expf(element - shift) * per_sum;
    }
  if (threadIdx.x == 0) {
    logsumexp[row] = empty ? -INFINITY : shift + logf(sum);
    weight_sums[row] = kept * per_sum * all.kept_scale;
  }
}

// ---- Backward ----

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
}  // namespace fast_prompt::cuda
