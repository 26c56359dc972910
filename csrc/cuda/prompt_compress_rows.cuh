// The forward's kernel of prompt_compress that goes over rows (sample, head, query) alone.

#pragma once

#include "prompt_compress_tokens.cuh"

namespace fast_prompt::cuda::compress {
namespace {

// ---- The splits of a row become one ----

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

}  // namespace
}  // namespace fast_prompt::cuda::compress
