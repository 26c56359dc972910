// What the forward and the backward of prompt_diffusion share: how a block of threads lies over rows and prompts, and
// the passage from scores to activations, with what a row must remember of them.

#pragma once

#include "tile.cuh"

namespace fast_prompt::cuda {
namespace {

// The inputs as the kernels see them. Prompts and keys are of the activations' type here.
template <class T>
struct Problem {
  Matrix<T> hidden, source, prompts, keys;
  Matrix<T> prompts_rest, keys_rest;  // what rounding took from float32 weights; data is null if nothing
  int64_t rows;
  int width, num_prompts;
  const float* log_scale;
  const int64_t* seed;
  bool softmax, max_weight;
  uint32_t dropout_threshold;
  float kept_scale;
  bool aligned;  // every address and stride, the outputs' too, is a multiple of 16 bytes

  __device__ int parts() const { return keys_rest.data ? 2 : 1; }
};

// ROW_WARPS x COLUMN_WARPS warps take a tile of scores [ROWS, COLUMNS], each [16 M, 8 N] of it, in registers. STAGES
// tiles of operands are in flight; BLOCKS such blocks are meant to share a multiprocessor.
template <int ROW_WARPS_, int COLUMN_WARPS_, int M_, int N_, int STAGES_, int BLOCKS_>
struct Layout {
  static constexpr int ROW_WARPS = ROW_WARPS_, COLUMN_WARPS = COLUMN_WARPS_, M = M_, N = N_;
  static constexpr int STAGES = STAGES_, BLOCKS = BLOCKS_;
  static constexpr int WARPS = ROW_WARPS * COLUMN_WARPS, THREADS = 32 * WARPS;
  static constexpr int ROWS = ROW_WARPS * M * 16, COLUMNS = COLUMN_WARPS * N * 8;
  static constexpr int SLOTS = 2 * M;  // rows of the tile that a lane has scores of
  static_assert(COLUMNS % 16 == 0, "the prompts of a tile are multiplied 16 at a time");

  // Shared memory: the stages, each a tile of activations above one of weights; the tile of coefficients that the
  // second product multiplies by, [ROWS, prompts]; and floats that threads exchange.
  template <class T>
  static constexpr int STAGE = (ROWS + COLUMNS) * PITCH<T>;
  static constexpr int ROW_EXCHANGE = COLUMN_WARPS * ROWS, ROW_EXCHANGES = 5, BLOCK_EXCHANGES = 3;

  __host__ __device__ static constexpr int blocks(int64_t num_prompts) {
    return static_cast<int>(ceil_div(num_prompts, COLUMNS));
  }
  template <class T>
  __host__ __device__ static constexpr int coefficient_pitch(int64_t num_prompts) {
    return blocks(num_prompts) * COLUMNS + PADDING<T>;
  }
  template <class T>
  static constexpr int64_t shared_bytes(int64_t num_prompts) {
    const int64_t elements = STAGES * STAGE<T> + ROWS * coefficient_pitch<T>(num_prompts);
    const int64_t floats = ROW_EXCHANGES * ROW_EXCHANGE + BLOCK_EXCHANGES * WARPS + blocks(num_prompts) * ROWS;
    return elements * sizeof(T) + floats * sizeof(float);
  }
};

template <class L, class Body>
__device__ inline void for_each_score(Sums<L::M, L::N>& scores, const Place<L>& place, Body body) {
  for_each_pair(scores, place.pair, [&](float& first, float& second, int slot, int column) {
    body(first, slot, place.first_column + column);
    body(second, slot, place.first_column + column + 1);
  });
}

// Reduces each of a thread's rows over all columns; every thread of a row gets the result. `exchange` is free again
// after the block's next barrier.
template <class L, class Operation>
__device__ inline void reduce_rows(float (&value)[L::SLOTS], const Place<L>& place, float* exchange,
                                   Operation operation) {
#pragma unroll
  for (int slot = 0; slot < L::SLOTS; ++slot) value[slot] = reduce_lanes<3>(value[slot], operation);
  if constexpr (L::COLUMN_WARPS > 1) {
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot)
      if (place.pair == 0) exchange[place.column_warp * L::ROWS + place.row(slot)] = value[slot];
    __syncthreads();
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot) {
      value[slot] = exchange[place.row(slot)];
#pragma unroll
      for (int warp = 1; warp < L::COLUMN_WARPS; ++warp)
        value[slot] = operation(value[slot], exchange[warp * L::ROWS + place.row(slot)]);
    }
  }
}

// ---- Scores and activations ----
// An activation a >= 0 that dropout drops is held as -a, so that a and its fate are one number. Softmax activations
// are exp(s - shift) until their row's sum is known.

__device__ inline float kept(float signed_activation) { return signed_activation < 0 ? 0 : signed_activation; }

// What a thread's rows are known to hold over the blocks of prompts so far, relative to `shift`.
template <class L>
struct RowState {
  float shift[L::SLOTS], sum[L::SLOTS], largest[L::SLOTS];
  float decay[L::SLOTS];  // what the latest change of `shift` multiplied earlier activations by

  __device__ RowState() {
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot) {
      shift[slot] = -INFINITY;
      sum[slot] = largest[slot] = 0;
      decay[slot] = 1;
    }
  }
};

// How deep the product of a block's coefficients with its weights is: the prompts there are, rounded up to whole steps.
template <class L>
__device__ inline int depth_of(int block, int num_prompts) {
  const int left = (num_prompts - block * L::COLUMNS + 15) / 16 * 16;
  return left < L::COLUMNS ? left : L::COLUMNS;
}

template <class L, class T>
__device__ inline void hide_absent_prompts(const Problem<T>& problem, Sums<L::M, L::N>& scores, int first_prompt,
                                           const Place<L>& place) {
  const float hidden = problem.softmax ? -INFINITY : 0;
  for_each_score<L>(scores, place, [&](float& score, int, int column) {
    if (first_prompt + column >= problem.num_prompts) score = hidden;
  });
}

// Softmax: moves `shift` up to the largest score so far.
template <class L>
__device__ inline void shift_to_largest(Sums<L::M, L::N>& scores, RowState<L>& state, const Place<L>& place,
                                        float* exchange) {
  float top[L::SLOTS];
#pragma unroll
  for (int slot = 0; slot < L::SLOTS; ++slot) top[slot] = -INFINITY;
  for_each_score<L>(scores, place, [&](float score, int slot, int) { top[slot] = ptx::max_or_nan(top[slot], score); });
  reduce_rows<L>(top, place, exchange, Larger());
#pragma unroll
  for (int slot = 0; slot < L::SLOTS; ++slot) {
    const float before = state.shift[slot];
    state.shift[slot] = ptx::max_or_nan(before, top[slot]);
    state.decay[slot] = expf(before - state.shift[slot]);
  }
}

template <class L, class T>
__device__ inline void drop(const Problem<T>& problem, Sums<L::M, L::N>& activations, int64_t first_row,
                            int first_prompt, const Place<L>& place) {
  const uint64_t seed = static_cast<uint64_t>(*problem.seed);
#pragma unroll
  for (int m = 0; m < L::M; ++m)
#pragma unroll
    for (int n = 0; n < L::N; ++n) {
      uint64_t index[4];
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        index[i] = (first_row + place.row(2 * m + i / 2)) * problem.num_prompts + first_prompt + place.first_column +
                   n * 8 + place.pair * 2 + i % 2;
      philox(seed, index, word);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (word[i] < problem.dropout_threshold) activations.at[m][n][i] = -activations.at[m][n][i];
    }
}

// Scores to signed activations.
template <class L, class T>
__device__ inline void activate(const Problem<T>& problem, Sums<L::M, L::N>& scores, const RowState<L>& state,
                                int64_t first_row, int first_prompt, const Place<L>& place) {
  if (problem.softmax)
    for_each_score<L>(scores, place, [&](float& score, int slot, int) { score = expf(score - state.shift[slot]); });
  else
    for_each_score<L>(scores, place, [&](float& score, int, int) { score = score < 0 ? 0 : score; });  // keeps NaN
  if (problem.dropout_threshold > 0) drop<L>(problem, scores, first_row, first_prompt, place);
}

// Adds a block's activations to what its rows remember.
template <class L, class T>
__device__ inline void remember(const Problem<T>& problem, Sums<L::M, L::N>& activations, RowState<L>& state,
                                const Place<L>& place, float* sum_exchange, float* largest_exchange) {
  float sum[L::SLOTS] = {}, largest[L::SLOTS] = {};
  for_each_score<L>(activations, place, [&](float activation, int slot, int) {
    sum[slot] += fabsf(activation);
    largest[slot] = ptx::max_or_nan(largest[slot], kept(activation));
  });
  if (problem.softmax) reduce_rows<L>(sum, place, sum_exchange, Add());
  reduce_rows<L>(largest, place, largest_exchange, Larger());
#pragma unroll
  for (int slot = 0; slot < L::SLOTS; ++slot) {
    state.sum[slot] = state.sum[slot] * state.decay[slot] + sum[slot];
    state.largest[slot] = ptx::max_or_nan(state.largest[slot] * state.decay[slot], largest[slot]);
  }
}

// What makes R of a row's kept activations.
template <class L, class T>
__device__ inline float normalizer(const Problem<T>& problem, const RowState<L>& state, int slot) {
  return problem.softmax ? problem.kept_scale / state.sum[slot] : problem.kept_scale;
}

// e^s w.
template <class L, class T>
__device__ inline float row_factor(const Problem<T>& problem, const RowState<L>& state, int slot, float scale) {
  return problem.max_weight ? scale * state.largest[slot] * normalizer<L>(problem, state, slot) : scale;
}

}  // namespace
}  // namespace fast_prompt::cuda
