// What the kernels of skip_adapter share: how a block of threads lies over rows, the rows it takes and the ring of
// stages that weights come through, the norms' statistics, and the passage from the hidden layer to what is multiplied.

#pragma once

#include <cstring>

#include "../skip_adapter.h"
#include "tile.cuh"

namespace fast_prompt::cuda::skip {

// A call as the kernels see it; the parameters are of the activations' type here.
template <class T>
struct Problem {
  Matrix<T> x;
  Matrix<T> down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias;  // data is null where not given
  const float *scale, *gates;
  const int64_t *route, *seed;
  int64_t rows, sample_rows;  // of all samples; of one, where gates or a route tell them apart, else of all
  int width, adapter_width;
  int experts, groups;                // both 1 without gates
  int group_width, expert_width;      // of a group: columns of the result, and hidden ones
  int first_adapter, adapters;        // that a launch applies one after the other
  SkipNorm norm;
  SkipActivation activation;
  SkipResidual residual;
  float eps;
  uint32_t dropout_threshold;
  float kept_scale;
  bool aligned;  // every address and stride, the outputs' too, is a multiple of 16 bytes

  __device__ bool normed_before() const { return norm == SkipNorm::LAYER || norm == SkipNorm::RMS; }
  __host__ __device__ int chunks() const { return static_cast<int>(ceil_div(width, CHUNK<T>)); }
  __host__ __device__ int up_depth() const { return experts * expert_width; }  // columns of the up weight
  __device__ float scale_of(int adapter) const { return scale ? scale[adapter] : 1; }

  // An adapter's own matrix of weights that there is one of for each.
  __device__ Matrix<T> weight(const Matrix<T>& weights, int64_t adapter) const {
    return {weights.data + adapter * weights.batch_stride, UNBROKEN, 0, weights.row_stride};
  }
  // An adapter's of vectors that there is one of for each; null where they are not given.
  __device__ const T* vector(const Matrix<T>& vectors, int64_t adapter) const {
    return vectors.data ? vectors.data + adapter * vectors.row_stride : nullptr;
  }
  // An element of it; 0 where it is not given.
  __device__ float at(const Matrix<T>& vectors, int64_t adapter, int column) const {
    return vectors.data ? to_float(vector(vectors, adapter)[column]) : 0;
  }
  // The groups of columns that a chunk of the result has columns of.
  __device__ int first_group(int chunk) const { return groups == 1 ? 0 : chunk * CHUNK<T> / group_width; }
  __device__ int last_group(int chunk) const {
    const int last = (chunk + 1) * CHUNK<T> < width ? (chunk + 1) * CHUNK<T> : width;
    return groups == 1 ? 0 : (last - 1) / group_width;
  }
};

// What the forward kernel makes of its rows: the op's result; the same from a hidden layer that was kept, for the rows within a
// run; or, where a norm comes after the adapter, from the result's gradient the one of what that norm is of.
enum class Purpose { forward, replay, derive };

// What a launch reads besides the problem, and what it writes.
template <class T>
struct RowResults {
  Purpose purpose;
  T* output;              // [rows, width]
  T* hidden;              // [adapters, rows, adapter_width]; written by `forward` unless null, else read
  float* norm_sums;       // derive: [row tiles, ROW_WARPS, 2, width], parts of the norm's weight's and bias's gradients
};

// ROW_WARPS x COLUMN_WARPS warps take a tile of rows [ROWS, width]; in the hidden layer, COLUMNS of it at a time, each
// has [16 M, 8 N] in registers, and else its rows of a chunk's share of columns. STAGES tiles of operands are in
// flight; BLOCKS such blocks are meant to share a multiprocessor. Where RESIDENT, the rows stay in shared memory; else
// they come through the ring beside the weights.
template <int ROW_WARPS_, int COLUMN_WARPS_, int M_, int N_, int STAGES_, int BLOCKS_, int RESIDENT_>
struct Layout {
  static constexpr int ROW_WARPS = ROW_WARPS_, COLUMN_WARPS = COLUMN_WARPS_, M = M_, N = N_;
  static constexpr int STAGES = STAGES_, BLOCKS = BLOCKS_, RESIDENT = RESIDENT_;
  static constexpr int WARPS = ROW_WARPS * COLUMN_WARPS, THREADS = 32 * WARPS;
  static constexpr int ROWS = ROW_WARPS * M * 16, COLUMNS = COLUMN_WARPS * N * 8;
  static constexpr int SLOTS = 2 * M;  // rows of the tile that a lane has sums of
  static_assert(COLUMNS % 16 == 0, "the hidden layer is multiplied 16 columns at a time");

  template <class T>
  static constexpr int WARP_CHUNK = CHUNK<T> / COLUMN_WARPS;  // columns of a chunk that a warp computes
  // Weights with the hidden layer as columns, [CHUNK, COLUMNS]; else they are [COLUMNS, CHUNK] of PITCH.
  template <class T>
  static constexpr int WIDE_PITCH = COLUMNS + PADDING<T>;

  // A stage: weights either way, a chunk of the norm's weight and bias, and tiles of rows, of which `row_tiles` says
  // how many.
  template <class T>
  static constexpr int WEIGHTS = COLUMNS * PITCH<T> > CHUNK<T> * WIDE_PITCH<T> ? COLUMNS * PITCH<T>
                                                                              : CHUNK<T> * WIDE_PITCH<T>;
  template <class T>
  static constexpr int NORMS = 2 * CHUNK<T>;
  template <class T>
  static constexpr int TILE = ROWS * PITCH<T>;
  template <class T>
  __host__ __device__ static constexpr int STAGE(int row_tiles) {
    return WEIGHTS<T> + NORMS<T> + row_tiles * TILE<T>;
  }

  __host__ __device__ static constexpr int blocks(int columns) { return static_cast<int>(ceil_div(columns, COLUMNS)); }
};

// The operand of the up projection in shared memory: for each group its hidden columns expert after expert, each
// expert's times its gate, padded with zeros to whole steps of the product.
__host__ __device__ constexpr int group_pitch(int up_depth) { return (up_depth + 15) / 16 * 16; }

template <class T>
__host__ __device__ int operand_pitch(const Problem<T>& problem) {
  return problem.groups * group_pitch(problem.up_depth()) + PADDING<T>;
}

// How deep the product with a block of COLUMNS hidden columns is, in whole steps.
template <class L>
__device__ inline int depth_of(int block, int columns) {
  const int left = (columns - block * L::COLUMNS + 15) / 16 * 16;
  return left < L::COLUMNS ? left : L::COLUMNS;
}

// ---- Tiles of rows ----

// The row tiles of a block, one after another: no tile has rows of two samples that differ, and kept ones are left out.
template <class T, class L>
class RowTile {
  const Problem<T>* problem;
  int64_t tiles_per_sample, tiles;

 public:
  int64_t index = blockIdx.x, sample = 0, first_row = 0, end_row = 0;  // end_row: of the sample
  int adapter = 0;                                                     // the first one's parameters

  __device__ explicit RowTile(const Problem<T>& problem)
      : problem(&problem),
        tiles_per_sample(ceil_div(problem.sample_rows, L::ROWS)),
        tiles(problem.rows / problem.sample_rows * tiles_per_sample) {
    settle();
  }

  __device__ bool exists() const { return index < tiles; }

  __device__ void advance() {
    index += gridDim.x;
    settle();
  }

 private:
  __device__ void settle() {
    adapter = problem->first_adapter;
    for (; exists(); index += gridDim.x) {
      sample = static_cast<uint32_t>(index) / static_cast<uint32_t>(tiles_per_sample);
      if (problem->route) adapter = static_cast<int>(problem->route[sample]);
      if (adapter >= 0) break;
    }
    first_row = sample * problem->sample_rows + (index - sample * tiles_per_sample) * L::ROWS;
    end_row = (sample + 1) * problem->sample_rows;
  }
};

// ---- Weights through a ring of stages ----

// Loading runs STAGES - 1 steps ahead of use, across row tiles, so that memory never waits for arithmetic. A Loader
// starts the copies of one step after another, if any is left.
template <class T, class L, class Loader>
class Ring {
  Loader loader;
  T* const stages;
  const int stage_length;
  int free_stage = 0, ready_stage = 0;

 public:
  __device__ Ring(const Loader& loader, T* stages, int stage_length)
      : loader(loader), stages(stages), stage_length(stage_length) {
#pragma unroll 1
    for (int i = 0; i < L::STAGES - 1; ++i) load_next();
  }

  // The next stage, filled; until the call after this one. A barrier for the block.
  __device__ T* next() {
    ptx::copy_wait<L::STAGES - 2>();
    __syncthreads();
    load_next();
    T* stage = stages + ready_stage * stage_length;
    ready_stage = (ready_stage + 1) % L::STAGES;
    return stage;
  }

 private:
  __device__ void load_next() {
    loader.load(stages + free_stage * stage_length);
    ptx::copy_commit();
    free_stage = (free_stage + 1) % L::STAGES;
  }
};

// [COLUMNS, CHUNK] of an adapter's down weight.
template <class T, class L>
__device__ inline void load_down_weight(T* tile, const Problem<T>& problem, int adapter, int block, int chunk) {
  load_tile<L::COLUMNS, CHUNK<T>, L::THREADS>(tile, PITCH<T>, problem.weight(problem.down_weight, adapter),
                                              block * L::COLUMNS, problem.adapter_width, chunk * CHUNK<T>,
                                              problem.width, problem.aligned);
}

// [CHUNK, COLUMNS] of an adapter's up weight; zeros for result columns of other groups.
template <class T, class L>
__device__ inline void load_up_weight(T* tile, const Problem<T>& problem, int adapter, int chunk, int group,
                                      int block) {
  const int group_width = problem.group_width, first_column = chunk * CHUNK<T>;
  load_tile<CHUNK<T>, L::COLUMNS, L::THREADS>(
      tile, L::template WIDE_PITCH<T>, problem.weight(problem.up_weight, adapter), first_column,
      (group + 1) * group_width, block * L::COLUMNS, problem.up_depth(), problem.aligned, threadIdx.x,
      [&](int row) { return first_column + row < group * group_width; });
}

// A chunk of the norm's weight, and of its bias after it.
template <class T, class L>
__device__ inline void load_norm(T* target, const Problem<T>& problem, int adapter, int chunk) {
  const auto load_vector = [&](T* tile, const Matrix<T>& vectors) {
    load_tile<1, CHUNK<T>, L::THREADS>(tile, CHUNK<T>, Matrix<T>{problem.vector(vectors, adapter), UNBROKEN, 0, 0}, 0,
                                       1, chunk * CHUNK<T>, problem.width, problem.aligned);
  };
  load_vector(target, problem.norm_weight);
  if (problem.norm_bias.data) load_vector(target + CHUNK<T>, problem.norm_bias);
}

// A chunk of a row tile.
template <class T, class L>
__device__ inline void load_rows(T* tile, const Problem<T>& problem, const Matrix<T>& from,
                                 const RowTile<T, L>& rows, int chunk) {
  load_tile<L::ROWS, CHUNK<T>, L::THREADS>(tile, PITCH<T>, from, rows.first_row, rows.end_row, chunk * CHUNK<T>,
                                           problem.width, problem.aligned);
}

// ---- Norms ----

// What a norm subtracts from a row, and then multiplies it by.
struct RowNorm {
  float mean, rstd;

  __device__ float operator()(float x) const { return (x - mean) * rstd; }
};

// 16 bytes of a row that has `count` elements there, zeros after them.
template <class T>
__device__ inline Piece<T> read_piece(const T* source, int count, bool aligned) {
  if (aligned && count == PADDING<T>) return *reinterpret_cast<const Piece<T>*>(source);
  Piece<T> piece;
#pragma unroll
  for (int i = 0; i < PADDING<T>; ++i) piece.element[i] = i < count ? source[i] : T(0.0f);
  return piece;
}

// Statistics of a row of `width` elements by 8 lanes together: the mean first, then what is left of the squares without
// it, and of the mean: a row of one value has exactly that for its mean, where 1 / sqrt(eps) would make much of any error.
// read(chunk) gives a lane its piece of a chunk, zeros beyond the row.
template <class T, class Read>
__device__ inline RowNorm measure_row(const Problem<T>& problem, int piece_of_chunk, Read read) {
  const auto sum = [&](auto of_element) {
    float total = 0;
    for (int chunk = 0; chunk < problem.chunks(); ++chunk) {
      const Piece<T> piece = read(chunk);
      const int left = problem.width - chunk * CHUNK<T> - piece_of_chunk * PADDING<T>;
#pragma unroll
      for (int i = 0; i < PADDING<T>; ++i) total += i < left ? of_element(to_float(piece.element[i])) : 0;
    }
    return reduce_lanes<7>(total, Add());
  };
  const float per_element = 1.0f / static_cast<float>(problem.width);
  if (problem.norm == SkipNorm::RMS)
    return {0, rsqrtf(sum([](float x) { return x * x; }) * per_element + problem.eps)};
  const float mean = sum([](float x) { return x; }) * per_element;
  float left = 0;
  const float square = sum([&left, mean](float x) {
    left += x - mean;
    return (x - mean) * (x - mean);
  }) * per_element;
  const float rest = reduce_lanes<7>(left, Add()) * per_element;
  return {mean + rest, rsqrtf(fmaxf(square - rest * rest, 0) + problem.eps)};
}

// Count, mean and sum of squared differences from the mean, of numbers that come a few at a time.
struct Moments {
  float count = 0, mean = 0, squares = 0;

  __device__ void merge(const Moments& other) {
    const float all = count + other.count;
    if (other.count == 0) return;
    const float difference = other.mean - mean, share = other.count / all;
    mean += difference * share;
    squares += other.squares + difference * difference * count * share;
    count = all;
  }

  __device__ RowNorm norm(float eps) const { return {mean, rsqrtf(squares / count + eps)}; }
};

// Over the eight lanes that share columns of a fragment.
__device__ inline float sum_groups(float value) {
#pragma unroll
  for (int bit = 4; bit <= 16; bit *= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, bit);
  return value;
}

// A fragment of a tile whose elements are changed by change(element, lower, column): lower of the fragment's 16 rows
// are the last 8.
template <class T, class Change>
__device__ inline void load_changed(Left<T>& left, const Half<T>* tile, int pitch, int lane, Change change) {
  load(left, tile, pitch, lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Pair<T> pair;
    memcpy(&pair, &left.part[i], sizeof pair);
    const int column = i / 2 * 8 + lane % 4 * 2;
    assign(pair.first, change(to_float(pair.first), i % 2 == 1, column));
    assign(pair.second, change(to_float(pair.second), i % 2 == 1, column + 1));
    memcpy(&left.part[i], &pair, sizeof pair);
  }
}

template <class T, class Change>
__device__ inline void load_changed(Left<T>& left, const float* tile, int pitch, int lane, Change change) {
  gather(left, lane, [=](int m, int k) { return change(tile[m * pitch + k], m >= 8, k); });
}

// ---- The hidden layer ----

constexpr float SQRT_HALF = 0.70710678f, INVERSE_SQRT_2_PI = 0.39894228f;

__device__ inline float activate(SkipActivation activation, float h) {
  switch (activation) {
    case SkipActivation::RELU: return h < 0 ? 0 : h;  // keeps NaN
    case SkipActivation::SILU: return h / (1 + expf(-h));
    default: return 0.5f * h * (1 + erff(h * SQRT_HALF));
  }
}

__device__ inline float activation_slope(SkipActivation activation, float h) {
  switch (activation) {
    case SkipActivation::RELU: return h <= 0 ? 0 : 1;
    case SkipActivation::SILU: {
      const float sigmoid = 1 / (1 + expf(-h));
      return sigmoid * (1 + h * (1 - sigmoid));
    }
    default: return 0.5f * (1 + erff(h * SQRT_HALF)) + h * INVERSE_SQRT_2_PI * expf(-0.5f * h * h);
  }
}

// What dropout multiplies four neighbouring hidden elements by, `first` being the Philox index of the first.
template <class T>
__device__ inline void dropout_factors(const Problem<T>& problem, int64_t first, float (&factor)[4]) {
  uint64_t index[4];
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    index[i] = static_cast<uint64_t>(first + i);
    factor[i] = problem.kept_scale;
  }
  if (problem.dropout_threshold == 0) return;
  philox(static_cast<uint64_t>(*problem.seed), index, word);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (word[i] < problem.dropout_threshold) factor[i] = 0;
}

__device__ inline float dropped(float element, float factor) { return factor == 0 ? 0 : factor * element; }

// Where a hidden column is in a row of the up projection's operand; with gates, where the first expert's is.
template <class T>
__device__ inline int operand_column(const Problem<T>& problem, int column) {
  if (!problem.gates) return column;
  const int group = static_cast<unsigned>(column) / static_cast<unsigned>(problem.expert_width);
  return group * (group_pitch(problem.up_depth()) - problem.expert_width) + column;
}

// Writes a hidden element, activated, to `target`, its place in the operand; with gates to each expert's.
template <class T>
__device__ inline void write_operand(const Problem<T>& problem, T* target, int64_t sample, float t) {
  if (!problem.gates) return assign(*target, t);
#pragma unroll 1
  for (int expert = 0; expert < problem.experts; ++expert)
    assign(target[expert * problem.expert_width], problem.gates[sample * problem.experts + expert] * t);
}

// A warp's part of a block of hidden columns, four elements of a row at a time: calls body(row, column), the row in the
// tile, the column from the block's first. A loop that is not unrolled: what is done to a hidden element is long.
template <class L, class Body>
__device__ inline void for_each_hidden(const Place<L>& place, Body body) {
  __syncwarp();
#pragma unroll 1
  for (int i = place.lane; i < L::M * 16 * L::N * 2; i += 32)
    body(place.first_row + i / (L::N * 2), place.first_column + i % (L::N * 2) * 4);
}

}  // namespace fast_prompt::cuda::skip
