// The forward kernel of skip_adapter; skip_adapter.cu says how its work is laid out.

#pragma once

#include "skip_adapter_rows.cuh"

namespace fast_prompt::cuda::skip {
namespace {

template <class T, class L>
constexpr int64_t forward_shared_bytes(const Problem<T>& problem) {
  const int64_t elements = L::STAGES * int64_t{L::template STAGE<T>(L::RESIDENT ? 0 : 1)} +
                           L::ROWS * int64_t{operand_pitch(problem)} +
                           (L::RESIDENT ? problem.chunks() * int64_t{L::template TILE<T>} : 0);
  const int exchanged = problem.norm == SkipNorm::LAYER_AFTER ? 5 * L::COLUMN_WARPS : 0;
  return elements * static_cast<int64_t>(sizeof(T)) + L::ROWS * (2 + exchanged) * sizeof(float);
}

// Loads, for each row tile and each adapter, the down weight, block of hidden columns by block and chunk by chunk; then
// the up weight chunk by chunk, for each the groups it has columns of, block by block: once, or twice where the norm
// after it has to see the whole row first.
template <class T, class L>
class ForwardLoader {
  const Problem<T>& problem;
  const int chunks, down_blocks, up_blocks, first_pass, last_pass;
  RowTile<T, L> tile;
  int turn = 0, pass, block = 0, chunk = 0, group = 0;

 public:
  __device__ ForwardLoader(const Problem<T>& problem, const RowResults<T>& results)
      : problem(problem),
        chunks(problem.chunks()),
        down_blocks(L::blocks(problem.adapter_width)),
        up_blocks(L::blocks(problem.up_depth())),
        first_pass(results.purpose == Purpose::forward ? 0 : 1),
        last_pass(problem.norm == SkipNorm::LAYER_AFTER ? 2 : 1),
        tile(problem),
        pass(first_pass) {}

  __device__ void load(T* stage) {
    if (!tile.exists()) return;
    T* const norms = stage + L::template WEIGHTS<T>;
    const int adapter = tile.adapter + turn;
    const bool last = block == up_blocks - 1 && group == problem.last_group(chunk);
    if (!L::RESIDENT && (pass == 0 || last))
      load_rows<T, L>(norms + L::template NORMS<T>, problem, problem.x, tile, chunk);
    if (pass == 0) {
      load_down_weight<T, L>(stage, problem, adapter, block, chunk);
      if (problem.normed_before()) load_norm<T, L>(norms, problem, adapter, chunk);
      advance_down();
    } else {
      load_up_weight<T, L>(stage, problem, adapter, chunk, group, block);
      advance_up();
    }
  }

 private:
  __device__ void advance_down() {
    if (++chunk < chunks) return;
    chunk = 0;
    if (++block < down_blocks) return;
    block = 0;
    pass = 1;
    group = 0;
  }

  __device__ void advance_up() {
    if (++block < up_blocks) return;
    block = 0;
    if (group++ < problem.last_group(chunk)) return;
    if (++chunk == chunks) {
      chunk = 0;
      if (pass++ == last_pass) {
        pass = first_pass;
        if (++turn == problem.adapters) {
          turn = 0;
          tile.advance();
        }
      }
    }
    group = problem.first_group(chunk);
  }
};

// A block's shared memory, and where its threads are.
template <class T, class L>
struct ForwardBlock {
  const Problem<T>& problem;
  const RowResults<T>& results;
  const Place<L> place;
  const int chunks, pitch;  // of the operand
  T *resident, *stages, *operand;
  float *norms, *exchange;

  __device__ ForwardBlock(const Problem<T>& problem, const RowResults<T>& results)
      : problem(problem), results(results), chunks(problem.chunks()), pitch(operand_pitch(problem)) {
    resident = reinterpret_cast<T*>(ptx::dynamic_shared());
    stages = resident + (L::RESIDENT ? chunks * L::template TILE<T> : 0);
    operand = stages + L::STAGES * L::template STAGE<T>(L::RESIDENT ? 0 : 1);
    norms = reinterpret_cast<float*>(operand + L::ROWS * pitch);
    exchange = norms + 2 * L::ROWS;
  }

  // Of the hidden layer, with those that pad the operand; with gates without, since nothing but zeros is ever there.
  __device__ int operand_columns() const {
    return problem.gates ? problem.adapter_width : group_pitch(problem.adapter_width);
  }
  // The chunk of the rows, from the stage of the step that needs it.
  __device__ T* rows(T* stage, int chunk) const {
    return L::RESIDENT ? resident + chunk * L::template TILE<T> : stage + L::template WEIGHTS<T> + L::template NORMS<T>;
  }
  // The warp's part of such a chunk in the up projection.
  __device__ int warp_offset() const { return place.first_row * PITCH<T> + warp_column(); }
  __device__ int warp_column() const { return place.column_warp * L::template WARP_CHUNK<T>; }
};

// ---- The rows, and their norms ----

// A warp's part of a resident chunk: what it alone reads and writes in the up projection.
template <class T, class L>
__device__ inline void load_own_rows(const ForwardBlock<T, L>& block, const RowTile<T, L>& tile, int chunk) {
  const Problem<T>& problem = block.problem;
  load_tile<L::M * 16, L::template WARP_CHUNK<T>, 32>(
      block.rows(nullptr, chunk) + block.warp_offset(), PITCH<T>, problem.x, tile.first_row + block.place.first_row,
      tile.end_row, chunk * CHUNK<T> + block.warp_column(), problem.width, problem.aligned, block.place.lane,
      [](int) { return false; });
}

// Statistics of the tile's rows, four rows a warp at a time; a barrier must follow.
template <class T, class L>
__device__ inline void measure_rows(const ForwardBlock<T, L>& block, const RowTile<T, L>& tile) {
  const Problem<T>& problem = block.problem;
  const int piece = threadIdx.x % 8 * PADDING<T>;
#pragma unroll 1
  for (int row = threadIdx.x / 8; row < L::ROWS; row += L::THREADS / 8) {
    const int64_t global_row = tile.first_row + row;
    const bool inside = global_row < tile.end_row;
    const T* const source = problem.x.data + (inside ? problem.x.offset(global_row) : 0) + piece;
    const RowNorm norm = measure_row(problem, threadIdx.x % 8, [&](int chunk) {
      if (L::RESIDENT)
        return *reinterpret_cast<const Piece<T>*>(block.rows(nullptr, chunk) + row * PITCH<T> + piece);
      const int left = inside ? problem.width - chunk * CHUNK<T> - piece : 0;
      return read_piece(source + chunk * CHUNK<T>, left < PADDING<T> ? left : PADDING<T>, problem.aligned);
    });
    if (piece == 0) {
      block.norms[2 * row] = norm.mean;
      block.norms[2 * row + 1] = norm.rstd;
    }
  }
}

// ---- The hidden layer ----

// sums = norm(x) W_d^T for a block of hidden columns.
template <class T, class L, class Weights>
__device__ inline void down_product(const ForwardBlock<T, L>& block, Weights& weights,
                                    const RowNorm (&norm)[L::SLOTS], Sums<L::M, L::N>& sums) {
  const Place<L>& place = block.place;
  const bool normed = block.problem.normed_before(), biased = block.problem.norm_bias.data != nullptr;
  for (int chunk = 0; chunk < block.chunks; ++chunk) {
    T* const stage = weights.next();
    const T* const rows = block.rows(stage, chunk) + place.first_row * PITCH<T>;
    const T* const right = stage + place.first_column * PITCH<T>;
    const T* const norm_weight = stage + L::template WEIGHTS<T>;
#pragma unroll 1
    for (int k = 0; k < CHUNK<T>; k += 16) {
      Left<T> left[L::M];
#pragma unroll
      for (int m = 0; m < L::M; ++m) {
        const T* const tile = rows + m * 16 * PITCH<T> + k;
        if (normed)
          load_changed(left[m], tile, PITCH<T>, place.lane, [&](float x, bool lower, int column) {
            const float bias = biased ? to_float(norm_weight[CHUNK<T> + k + column]) : 0;
            return (lower ? norm[2 * m + 1](x) : norm[2 * m](x)) * to_float(norm_weight[k + column]) + bias;
          });
        else
          load(left[m], tile, PITCH<T>, place.lane);
      }
      multiply(sums, left,
               [&](auto& operand, int n) { load(operand, right + n * 8 * PITCH<T> + k, PITCH<T>, place.lane); });
    }
  }
}

// Puts the hidden elements, with their bias, where their activations will be.
template <class T, class L>
__device__ inline void write_hidden(const ForwardBlock<T, L>& block, int adapter, int first_column,
                                    const Sums<L::M, L::N>& sums) {
  const Problem<T>& problem = block.problem;
  const int end_column = block.operand_columns();
  const T* const down_bias = problem.vector(problem.down_bias, adapter);
#pragma unroll
  for (int i = 0; i < 2 * L::N; ++i) {
    const int column = first_column + block.place.first_column + i / 2 * 8 + block.place.pair * 2 + i % 2;
    if (column >= end_column) continue;
    const float bias = down_bias && column < problem.adapter_width ? to_float(down_bias[column]) : 0;
    T* const target = block.operand + operand_column(problem, column);
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot)
      assign(target[block.place.row(slot) * block.pitch], sums.at[slot / 2][i / 2][slot % 2 * 2 + i % 2] + bias);
  }
}

// A block of hidden columns: to, or from, where they are kept, and activated into the operand.
template <class T, class L>
__device__ inline void finish_hidden(const ForwardBlock<T, L>& block, const RowTile<T, L>& tile, int turn,
                                     int first_column) {
  const Problem<T>& problem = block.problem;
  const bool again = block.results.purpose != Purpose::forward;
  const int width = problem.adapter_width, end_column = block.operand_columns();
  for_each_hidden(block.place, [&](int row, int block_column) {
    const int column = first_column + block_column;
    const int64_t global_row = tile.first_row + row;
    const int64_t index = ((problem.first_adapter + turn) * problem.rows + global_row) * width + column;
    const int count = global_row < tile.end_row ? width - column : 0;
    T* const kept = block.results.hidden + index;
    float factor[4];
    dropout_factors(problem, index, factor);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i >= end_column) continue;
      T* const target = block.operand + row * block.pitch + operand_column(problem, column + i);
      T h = *target;
      if (again) h = i < count ? kept[i] : T(0.0f);
      if (!again && block.results.hidden && i < count) kept[i] = h;
      write_operand(problem, target, tile.sample, dropped(activate(problem.activation, to_float(h)), factor[i]));
    }
  });
}

// ---- The up projection ----

// Adds the bias of a thread's columns of the result; with gates the experts' by their gates.
template <class T, int N>
__device__ inline void add_up_bias(const Problem<T>& problem, int adapter, int64_t sample, int first_column,
                                   float (&bias)[2 * N]) {
  if (!problem.up_bias.data) return;
#pragma unroll 1
  for (int expert = 0; expert < problem.experts; ++expert) {
    const float gate = problem.gates ? problem.gates[sample * problem.experts + expert] : 1;
    const T* const vector = problem.vector(problem.up_bias, problem.gates ? expert : adapter);
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      const int column = first_column + i / 2 * 8 + i % 2;
      if (column < problem.width) bias[i] += gate * to_float(vector[column]);
    }
  }
}

// v = s (W_u t + b_u) for the warp's part of a chunk; returns the stage of the chunk's last step.
template <class T, class L, class Weights>
__device__ inline T* up_product(const ForwardBlock<T, L>& block, Weights& weights, const RowTile<T, L>& tile,
                                int adapter, int chunk, Sums<L::M, L::template WARP_CHUNK<T> / 8>& sums) {
  const Problem<T>& problem = block.problem;
  const Place<L>& place = block.place;
  constexpr int WIDE_PITCH = L::template WIDE_PITCH<T>, N = L::template WARP_CHUNK<T> / 8;
  T* stage = nullptr;
  for (int group = problem.first_group(chunk); group <= problem.last_group(chunk); ++group)
    for (int depth_block = 0; depth_block < L::blocks(problem.up_depth()); ++depth_block) {
      stage = weights.next();
      multiply_by_rows(sums,
                       block.operand + place.first_row * block.pitch + group * group_pitch(problem.up_depth()) +
                           depth_block * L::COLUMNS,
                       block.pitch, stage + block.warp_column() * WIDE_PITCH, WIDE_PITCH,
                       depth_of<L>(depth_block, problem.up_depth()), place.lane);
    }
  const float scale = problem.scale_of(adapter);
  float bias[2 * N] = {};
  add_up_bias<T, N>(problem, adapter, tile.sample, chunk * CHUNK<T> + block.warp_column() + place.pair * 2, bias);
  for_each_pair(sums, 0, [&](float& first, float& second, int, int column) {  // of pair 0: its n-th are 2 n, 2 n + 1
    first = scale * (first + bias[column / 4]);
    second = scale * (second + bias[column / 4 + 1]);
  });
  return stage;
}

// A thread's columns of a chunk of one of the norm's vectors; zeros beyond the row, and for null.
template <int N, class T>
__device__ inline void read_columns(const T* vector, int first_column, int width, float (&values)[2 * N]) {
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) {
    const int column = first_column + i / 2 * 8 + i % 2;
    values[i] = vector && column < width ? to_float(vector[column]) : 0;
  }
}

// What the rows' norm after the adapter is known to be of; for `derive` also the sums of weight * gradient, and of that
// times v, over a row.
template <class L>
struct NormAfter {
  Moments of[L::SLOTS];
  float slope[L::SLOTS] = {}, moment[L::SLOTS] = {}, rstd[L::SLOTS] = {};

  __device__ RowNorm norm(int slot) const { return {of[slot].mean, rstd[slot]}; }

  // Adds the warp's part of a chunk of v. at(slot, i) is weight * gradient in a thread's i-th column of it.
  template <int N, class At>
  __device__ void remember(const Sums<L::M, N>& v, int pair, int columns_left, At at) {
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot) {
      Moments chunk;
      const auto for_each = [&](auto body) {
#pragma unroll
        for (int i = 0; i < 2 * N; ++i)
          if (i / 2 * 8 + pair * 2 + i % 2 < columns_left) body(v.at[slot / 2][i / 2][slot % 2 * 2 + i % 2], i);
      };
      const float first = v.at[slot / 2][0][slot % 2 * 2];  // of one value alone, exactly the mean
      for_each([&](float value, int) {
        chunk.count += 1;
        chunk.mean += value - first;
      });
      if (chunk.count > 0) chunk.mean = first + chunk.mean / chunk.count;
      for_each([&](float value, int i) {
        const float product = at(slot, i);
        chunk.squares += (value - chunk.mean) * (value - chunk.mean);
        slope[slot] += product;
        moment[slot] += product * value;
      });
      of[slot].merge(chunk);
    }
  }

  // Over the lanes and warps that share a row. `exchange` holds five floats for each row and column warp.
  __device__ void finish(const Place<L>& place, float* exchange, float eps) {
    constexpr int EACH = 5;
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot) {
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2)
        of[slot].merge({__shfl_xor_sync(0xFFFFFFFF, of[slot].count, bit),
                        __shfl_xor_sync(0xFFFFFFFF, of[slot].mean, bit),
                        __shfl_xor_sync(0xFFFFFFFF, of[slot].squares, bit)});
      float* const own = exchange + (place.row(slot) * L::COLUMN_WARPS + place.column_warp) * EACH;
      const float values[EACH] = {of[slot].count, of[slot].mean, of[slot].squares,
                                  reduce_lanes<3>(slope[slot], Add()),
                                  reduce_lanes<3>(moment[slot], Add())};
      if (place.pair == 0)
        for (int i = 0; i < EACH; ++i) own[i] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot) {
      const float* const row = exchange + place.row(slot) * L::COLUMN_WARPS * EACH;
      of[slot] = Moments();
      slope[slot] = moment[slot] = 0;
#pragma unroll 1
      for (int warp = 0; warp < L::COLUMN_WARPS; ++warp) {
        of[slot].merge({row[warp * EACH], row[warp * EACH + 1], row[warp * EACH + 2]});
        slope[slot] += row[warp * EACH + 3];
        moment[slot] += row[warp * EACH + 4];
      }
      rstd[slot] = of[slot].norm(eps).rstd;
      moment[slot] = (moment[slot] - slope[slot] * of[slot].mean) * rstd[slot] / of[slot].count;
      slope[slot] /= of[slot].count;
    }
  }
};

// Turns v into the result, or into the gradient of v, in the place of x, or of the gradient.
template <class T, class L, int N>
__device__ inline void finish_rows(const ForwardBlock<T, L>& block, int adapter, int first_column,
                                   const RowNorm (&norm)[L::SLOTS], const NormAfter<L>& after, T* rows,
                                   Sums<L::M, N>& sums) {
  const Problem<T>& problem = block.problem;
  const bool derive = block.results.purpose == Purpose::derive, normed_after = problem.norm == SkipNorm::LAYER_AFTER;
  const bool reads_norm = derive || normed_after || problem.residual == SkipResidual::NORMED;
  const auto read = [&](const Matrix<T>& vectors, float(&values)[2 * N]) {
    const T* const vector = reads_norm ? problem.vector(vectors, adapter) : nullptr;
    read_columns<N>(vector, first_column + block.place.pair * 2, problem.width, values);
  };
  float norm_weight[2 * N], norm_bias[2 * N];
  read(problem.norm_weight, norm_weight);
  read(problem.norm_bias, norm_bias);
  const auto finish = [&](float v, const T& element, int slot, int i) {
    const float x = to_float(element);
    if (derive)
      return after.rstd[slot] *
             (norm_weight[i] * x - after.slope[slot] - after.norm(slot)(v) * after.moment[slot]);
    if (normed_after) v = after.norm(slot)(v) * norm_weight[i] + norm_bias[i];
    switch (problem.residual) {
      case SkipResidual::NONE: return v;
      case SkipResidual::INPUT: return v + x;
      default: return v + x + (norm[slot](x) * norm_weight[i] + norm_bias[i]);
    }
  };
  for_each_pair(sums, 0, [&](float& first, float& second, int slot, int column) {
    const int row = slot / 2 * 16 + slot % 2 * 8 + block.place.group;
    const auto& x = *reinterpret_cast<const Pair<T>*>(rows + row * PITCH<T> + column + block.place.pair * 2);
    first = finish(first, x.first, slot, column / 4);
    second = finish(second, x.second, slot, column / 4 + 1);
  });
  write_sums(sums, block.place.pair, block.place.group, rows, PITCH<T>);
}

// derive: a warp's part of the gradients of the norm's weight and bias, from its part of v and of the result's
// gradient.
template <class T, class L, int N>
__device__ inline void sum_norm_gradients(const ForwardBlock<T, L>& block, const RowTile<T, L>& tile, int first_column,
                                          const NormAfter<L>& after, const T* rows, const Sums<L::M, N>& v) {
  const Place<L>& place = block.place;
  const int width = block.problem.width;
  const int64_t part = tile.index * L::ROW_WARPS + place.first_row / (L::M * 16);
  float* const sums = block.results.norm_sums + part * 2 * width;
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) {
    const int column = i / 2 * 8 + place.pair * 2 + i % 2;
    float of_weight = 0, of_bias = 0;
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot) {
      if (tile.first_row + place.row(slot) >= tile.end_row) continue;
      const float grad = to_float(rows[(place.row(slot) - place.first_row) * PITCH<T> + column]);
      of_weight += grad * after.norm(slot)(v.at[slot / 2][i / 2][slot % 2 * 2 + i % 2]);
      of_bias += grad;
    }
    of_weight = sum_groups(of_weight);
    of_bias = sum_groups(of_bias);
    if (place.group == 0 && first_column + column < width) {
      sums[first_column + column] = of_weight;
      sums[width + first_column + column] = of_bias;
    }
  }
}

// The up projection of a row tile by one adapter, chunk by chunk; with a norm after it twice, the first time to measure
// the rows. The last adapter's result leaves, and the rows of the next tile take its place. Both times are turns of one
// loop, so that the product stands in the code once.
template <class T, class L, class Weights>
__device__ inline void project_up(const ForwardBlock<T, L>& block, Weights& weights, const RowTile<T, L>& tile,
                                  const RowTile<T, L>& next_tile, int turn, const RowNorm (&norm)[L::SLOTS]) {
  constexpr int N = L::template WARP_CHUNK<T> / 8;
  const Problem<T>& problem = block.problem;
  const int adapter = tile.adapter + turn;
  const bool derive = block.results.purpose == Purpose::derive;
  NormAfter<L> after;
  bool measuring = problem.norm == SkipNorm::LAYER_AFTER;
#pragma unroll 1
  for (int chunk = 0; chunk < block.chunks;) {
    Sums<L::M, N> sums;
    T* const stage = up_product<T, L>(block, weights, tile, adapter, chunk, sums);
    T* const rows = block.rows(stage, chunk) + block.warp_offset();
    const int first_column = chunk * CHUNK<T> + block.warp_column();
    ++chunk;
    if (measuring) {
      float norm_weight[2 * N];
      read_columns<N>(derive ? problem.vector(problem.norm_weight, adapter) : nullptr,
                      first_column + block.place.pair * 2, problem.width, norm_weight);
      after.remember(sums, block.place.pair, problem.width - first_column, [&](int slot, int i) {
        const int row = slot / 2 * 16 + slot % 2 * 8 + block.place.group;
        const float grad = to_float(rows[row * PITCH<T> + i / 2 * 8 + block.place.pair * 2 + i % 2]);
        return derive ? norm_weight[i] * grad : 0;
      });
      if (chunk < block.chunks) continue;
      after.finish(block.place, block.exchange, problem.eps);
      measuring = false;
      chunk = 0;
      continue;
    }
    if (derive) sum_norm_gradients(block, tile, first_column, after, rows, sums);
    finish_rows(block, adapter, first_column, norm, after, rows, sums);
    if (turn + 1 < problem.adapters) continue;
    store_warp_tile<L::M * 16, L::template WARP_CHUNK<T>>(block.results.output, rows, block.place.lane,
                                                          tile.first_row + block.place.first_row, tile.end_row,
                                                          first_column, problem.width, problem.aligned);
    if (L::RESIDENT && next_tile.exists()) load_own_rows(block, next_tile, chunk - 1);
  }
}

template <class T, class L>
__global__ void __launch_bounds__(L::THREADS, L::BLOCKS)
    forward_kernel(const __grid_constant__ Problem<T> problem, const __grid_constant__ RowResults<T> results) {
  const ForwardBlock<T, L> block(problem, results);
  RowTile<T, L> tile(problem);
  if (!tile.exists()) return;
  if (L::RESIDENT)
    for (int chunk = 0; chunk < block.chunks; ++chunk) load_own_rows(block, tile, chunk);
  Ring<T, L, ForwardLoader<T, L>> weights({problem, results}, block.stages, L::template STAGE<T>(L::RESIDENT ? 0 : 1));
  if (problem.gates)  // the operand's padding, which nothing else writes
    for (int i = threadIdx.x; i < L::ROWS * block.pitch; i += L::THREADS) block.operand[i] = T(0.0f);
  while (tile.exists()) {
    RowTile<T, L> next_tile = tile;
    next_tile.advance();
    if (L::RESIDENT) {
      ptx::copy_commit();
      ptx::copy_wait<0>();
    }
    for (int turn = 0; turn < problem.adapters; ++turn) {
      RowNorm norm[L::SLOTS] = {};
      __syncthreads();  // the rows are there, or the adapter before has written them
      if (problem.normed_before()) {
        measure_rows(block, tile);
        __syncthreads();
#pragma unroll
        for (int slot = 0; slot < L::SLOTS; ++slot)
          norm[slot] = {block.norms[2 * block.place.row(slot)], block.norms[2 * block.place.row(slot) + 1]};
      }
      for (int columns = 0; columns < problem.adapter_width; columns += L::COLUMNS) {
        Sums<L::M, L::N> sums;
        if (results.purpose == Purpose::forward) {
          down_product<T, L>(block, weights, norm, sums);
          write_hidden(block, tile.adapter + turn, columns, sums);
        }
        finish_hidden(block, tile, turn, columns);
      }
      project_up<T, L>(block, weights, tile, next_tile, turn, norm);
    }
    tile = next_tile;
  }
  ptx::copy_wait<0>();
}

}  // namespace
}  // namespace fast_prompt::cuda::skip
