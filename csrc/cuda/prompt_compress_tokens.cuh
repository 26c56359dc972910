// The passes of prompt_compress over the visual tokens; prompt_compress.cu says how their work is laid out.

#pragma once

#include "../prompt_compress.h"
#include "tile.cuh"

namespace fast_prompt::cuda::compress {

// ---- How a block of threads lies over rows, tokens and columns ----

constexpr int TILE = 16;  // rows of a row tile, tokens of a token tile
constexpr int TOKEN_WARPS = 8, TOKEN_THREADS = 32 * TOKEN_WARPS;
static_assert(TOKEN_THREADS == TILE * TILE, "a thread for each score of a tile");
constexpr int ROW_THREADS = 128;  // of the kernels that go over rows alone

// Each warp takes SLICE columns of every token; WIDTH columns, a group, are what a block takes at once.
template <int SLICE_>
struct TokenLayout {
  static constexpr int SLICE = SLICE_, WIDTH = TOKEN_WARPS * SLICE, STAGES = 3;
  template <class T>
  static constexpr int PITCH = SLICE + PADDING<T>;
  template <class T>
  static constexpr int STAGE = TILE * PITCH<T>;  // of a warp
  template <class T>
  static constexpr int COEFFICIENT_PITCH = TILE + PADDING<T>;

  // Blocks that are meant to share a multiprocessor: two, where 128 registers hold a thread's part of the row operand
  // and of the sums.
  template <class T>
  static constexpr int blocks() {
    return SLICE * sizeof(T) <= 192 ? 2 : 1;
  }

  // Shared memory: each warp's ring of stages; the coefficients that multiply a token tile, the warps' parts of the
  // scores, and what each row's earlier sums are multiplied by.
  template <class T>
  static constexpr int64_t shared_bytes() {
    const int64_t elements = TOKEN_WARPS * STAGES * STAGE<T> + TILE * COEFFICIENT_PITCH<T>;
    return elements * sizeof(T) + (TOKEN_WARPS * TILE * TILE + TILE) * sizeof(float);
  }
};

// What both passes are given: the tokens, and rows to multiply them by.
template <class T>
struct TokenPass {
  const T* visual;
  int64_t batch_stride, token_stride;
  bool aligned;  // every token begins at a multiple of 16 bytes
  Padding padding;
  const T* operand;  // [batch, operand_stride / operand_pitch, operand_pitch], of which a sample's first `rows`
  int64_t operand_stride;
  int operand_pitch;  // a multiple of 16; columns from `width` on are zero
  float* parts;       // [splits, batch * rows, width], the results
  int64_t batch;
  int rows, tokens, width;
  int groups, splits, split_tokens;  // split_tokens is a multiple of TILE
  const int64_t* seed;               // null without dropout
  uint32_t dropout_threshold;
  float kept_scale;
};

// A block's share: a row tile of a sample, a split of its tokens, and the group of columns that it computes.
template <class T>
struct Share {
  int64_t sample, first_of_sample;  // the sample's first row, of all samples' rows
  int split, group, first_row, begin, end;

  __device__ explicit Share(const TokenPass<T>& pass) {
    const int row_tiles = static_cast<int>(ceil_div(pass.rows, TILE));
    int64_t rest = blockIdx.x;
    split = static_cast<int>(rest % pass.splits);
    rest /= pass.splits;
    group = static_cast<int>(rest % pass.groups);
    rest /= pass.groups;
    first_row = static_cast<int>(rest % row_tiles) * TILE;
    sample = rest / row_tiles;
    first_of_sample = sample * pass.rows;
    begin = split * pass.split_tokens;
    end = begin + pass.split_tokens < pass.tokens ? begin + pass.split_tokens : pass.tokens;
  }
};

template <class T>
__device__ inline bool is_padding(const TokenPass<T>& pass, int64_t sample, int token) {
  const Padding& padding = pass.padding;
  return padding.data && padding.data[sample * padding.batch_stride + token * padding.token_stride];
}

// ---- A warp's slices of the tokens ----

template <class T, class L>
class TokenSlices {
  // The order in which a warp needs them: token tile by token tile, of each the block's own group of columns last, so
  // that it is still there for the second product. A warp loads what it alone reads, STAGES - 1 steps ahead of use:
  // no other warp need be waited for.
  const TokenPass<T>& pass;
  const Share<T>& share;
  T* const stages;
  const T* const tokens;
  const int lane = threadIdx.x % 32, warp_column = threadIdx.x / 32 * L::SLICE;
  int token, turn = 0, free_stage = 0, ready_stage = 0;

 public:
  __device__ TokenSlices(const TokenPass<T>& pass, const Share<T>& share, T* all_stages)
      : pass(pass),
        share(share),
        stages(all_stages + threadIdx.x / 32 * L::STAGES * L::template STAGE<T>),
        tokens(pass.visual + share.sample * pass.batch_stride),
        token(share.begin) {
#pragma unroll 1
    for (int i = 0; i < L::STAGES - 1; ++i) load_next();
  }

  // The warp's first column at a turn.
  __device__ int first_column(int turn) const {
    return (share.group + 1 + turn) % pass.groups * L::WIDTH + warp_column;
  }

  // The next slice; until the call after this one.
  __device__ const T* next() {
    ptx::copy_wait<L::STAGES - 2>();
    __syncwarp();
    load_next();
    const T* stage = stages + ready_stage * L::template STAGE<T>;
    ready_stage = (ready_stage + 1) % L::STAGES;
    return stage;
  }

 private:
  __device__ void load_next() {
    if (token < share.end) {
      load(stages + free_stage * L::template STAGE<T>, first_column(turn));
      if (++turn == pass.groups) {
        turn = 0;
        token += TILE;
      }
    }
    ptx::copy_commit();
    free_stage = (free_stage + 1) % L::STAGES;
  }

  // Zeros in place of padding, whose contents must not matter.
  __device__ void load(T* stage, int first_column) {
    load_tile<TILE, L::SLICE, 32>(
        stage, L::template PITCH<T>, Matrix<T>{tokens, UNBROKEN, 0, pass.token_stride}, token, share.end, first_column,
        pass.width, pass.aligned, lane,
        [&](int row) { return is_padding(pass, share.sample, token + row); });
  }
};

// ---- The row operand in registers ----

// [16, 16] of it, not yet split where it is float32.
template <class T>
struct Packed : Left<T> {};
template <>
struct Packed<float> {
  float at[2][4];
};

template <class T>
__device__ inline Left<T> unpack(const Packed<T>& packed) {
  return packed;
}

__device__ inline Left<float> unpack(const Packed<float>& packed) {
  Left<float> left;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; ++i) split(packed.at[half][i], left.large[half][i], left.small[half][i]);
  return left;
}

// From global memory, rows from `rows` on as zeros.
template <class T>
__device__ inline void load_packed(Packed<T>& packed, const T* from, int pitch, int rows, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8;
    packed.part[i] = row < rows ? *reinterpret_cast<const uint32_t*>(from + row * pitch + column) : 0;
  }
}

__device__ inline void load_packed(Packed<float>& packed, const float* from, int pitch, int rows, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i % 2 * 8, column = half * 8 + lane % 4 + i / 2 * 4;
      packed.at[half][i] = row < rows ? from[row * pitch + column] : 0;
    }
}

// A row tile's operand, the columns of a slice.
template <class T, class L>
struct RowOperand {
  Packed<T> at[L::SLICE / 16];

  __device__ void load(const TokenPass<T>& pass, const Share<T>& share, int first_column) {
    const T* const rows =
        pass.operand + share.sample * pass.operand_stride + int64_t{share.first_row} * pass.operand_pitch;
#pragma unroll
    for (int k = 0; k < L::SLICE / 16; ++k) {
      const int column = first_column + k * 16;
      const int present = column < pass.operand_pitch ? pass.rows - share.first_row : 0;
      load_packed(at[k], rows + column, pass.operand_pitch, present, threadIdx.x % 32);
    }
  }
};

// ---- A pass ----

// Where a warp's part of a score lies; neighbouring rows on other banks.
__device__ inline int score_offset(int row, int token) { return row * TILE + (token ^ row / 2 % 2 * 8); }

// The operand's rows times the tokens, [rows, tokens], through `step` to coefficients; the coefficients times the
// tokens, [rows, width], into `parts`. In the step each thread has the same row and column of every tile.
template <class T, class L, class Step>
__device__ inline void pass_over_tokens(const TokenPass<T>& pass, const Share<T>& share, Step& step) {
  constexpr int PITCH = L::template PITCH<T>, COEFFICIENT_PITCH = L::template COEFFICIENT_PITCH<T>;
  T* const stages = reinterpret_cast<T*>(ptx::dynamic_shared());
  T* const coefficients = stages + TOKEN_WARPS * L::STAGES * L::template STAGE<T>;
  float* const scores = reinterpret_cast<float*>(coefficients + TILE * COEFFICIENT_PITCH);
  float* const decays = scores + TOKEN_WARPS * TILE * TILE;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = threadIdx.x / TILE, column = threadIdx.x % TILE;

  TokenSlices<T, L> slices(pass, share, stages);
  RowOperand<T, L> operand;
  if (pass.groups == 1) operand.load(pass, share, slices.first_column(0));
  Sums<1, L::SLICE / 8> sums;
  for (int token = share.begin; token < share.end; token += TILE) {
    step.prepare(token + column);
    Sums<1, TILE / 8> products;
    const T* slice = nullptr;
    for (int turn = 0; turn < pass.groups; ++turn) {
      slice = slices.next();
      if (pass.groups > 1) operand.load(pass, share, slices.first_column(turn));
#pragma unroll
      for (int k = 0; k < L::SLICE / 16; ++k) {
        const Left<T> left[1] = {unpack(operand.at[k])};
        multiply(products, left, [&](auto& right, int n) { load(right, slice + n * 8 * PITCH + k * 16, PITCH, lane); });
      }
    }
    for_each_pair(products, lane % 4, [&](float first, float second, int slot, int pair_column) {
      float* const target = scores + warp * TILE * TILE + score_offset(slot * 8 + lane / 4, pair_column);
      *reinterpret_cast<Pair<float>*>(target) = {first, second};
    });
    __syncthreads();
    float score = 0;
#pragma unroll
    for (int part = 0; part < TOKEN_WARPS; ++part) score += scores[part * TILE * TILE + score_offset(row, column)];
    assign(coefficients[row * COEFFICIENT_PITCH + column], step.coefficient(score, token + column));
    if (Step::DECAYS && column == 0) decays[row] = step.decay;
    __syncthreads();
    if constexpr (Step::DECAYS)
      for_each_pair(sums, lane % 4, [&](float& first, float& second, int slot, int) {
        const float decay = decays[slot * 8 + lane / 4];
        first *= decay;
        second *= decay;
      });
    Left<T> left[1];
    load(left[0], coefficients, COEFFICIENT_PITCH, lane);
    multiply(sums, left, [&](auto& right, int n) { load_transposed(right, slice + n * 8, PITCH, lane); });
  }
  ptx::copy_wait<0>();

  const int first_column = share.group * L::WIDTH + warp * L::SLICE;
  float* const parts = pass.parts + (share.split * pass.batch * pass.rows + share.first_of_sample) * pass.width;
  for_each_pair(sums, lane % 4, [&](float first, float second, int slot, int pair_column) {
    const int64_t part_row = share.first_row + slot * 8 + lane / 4;
    const int part_column = first_column + pair_column;
    if (part_row >= pass.rows) return;
    if (part_column < pass.width) parts[part_row * pass.width + part_column] = first;
    if (part_column + 1 < pass.width) parts[part_row * pass.width + part_column + 1] = second;
  });
}

// Whether dropout keeps an element of the probabilities [batch * rows, tokens].
template <class T>
__device__ inline bool keeps(const TokenPass<T>& pass, int64_t row, int token) {
  if (!pass.seed) return true;
  const uint64_t index[1] = {static_cast<uint64_t>(row) * pass.tokens + token};
  uint32_t word[1];
  philox(static_cast<uint64_t>(*pass.seed), index, word);
  return word[0] >= pass.dropout_threshold;
}

// ---- Forward: online softmax ----

// What a split knows of a row: its largest score, and sums of exp(score - largest): all, and those that dropout keeps.
struct RowSums {
  float largest, all, kept;
};

struct SoftmaxResults {
  float* scores;  // [batch * rows, tokens], -inf for padding; or null
  RowSums* sums;  // [splits, batch * rows]
};

template <class T>
class Softmax {
  const TokenPass<T>& pass;
  const Share<T>& share;
  const SoftmaxResults& results;
  const int row = share.first_row + threadIdx.x / TILE;
  const bool writes = row < pass.rows && share.group == 0;
  bool present = false;
  RowSums sums{-INFINITY, 0, 0};  // but for `largest`, the thread's part

 public:
  static constexpr bool DECAYS = true;
  float decay = 1;

  __device__ Softmax(const TokenPass<T>& pass, const Share<T>& share, const SoftmaxResults& results)
      : pass(pass), share(share), results(results) {}

  __device__ void prepare(int token) { present = token < share.end && !is_padding(pass, share.sample, token); }

  __device__ float coefficient(float score, int token) {
    if (!present) score = -INFINITY;
    if (results.scores && writes && token < share.end)
      results.scores[(share.first_of_sample + row) * pass.tokens + token] = score;
    const float before = sums.largest;
    sums.largest = ptx::max_or_nan(before, reduce_lanes<TILE - 1>(score, Larger()));
    const float shift = sums.largest == -INFINITY ? 0 : sums.largest;  // padding alone: exp(-inf) rather than NaN
    decay = expf(before - shift);
    const float activation = expf(score - shift);
    const float kept = activation != 0 && !keeps(pass, share.first_of_sample + row, token) ? 0 : activation;
    sums.all = sums.all * decay + activation;
    sums.kept = sums.kept * decay + kept;
    return kept;
  }

  __device__ void finish() {
    sums.all = reduce_lanes<TILE - 1>(sums.all, Add());
    sums.kept = reduce_lanes<TILE - 1>(sums.kept, Add());
    if (threadIdx.x % TILE == 0 && writes)
      results.sums[share.split * pass.batch * pass.rows + share.first_of_sample + row] = sums;
  }
};

// Grid: splits x groups x row tiles x samples, the first fastest.
template <class T, class L>
__global__ void __launch_bounds__(TOKEN_THREADS, L::template blocks<T>())
    attend_kernel(const __grid_constant__ TokenPass<T> pass, const __grid_constant__ SoftmaxResults results) {
  const Share<T> share(pass);
  Softmax<T> step(pass, share, results);
  pass_over_tokens<T, L>(pass, share, step);
  step.finish();
}

// ---- Backward: the derivatives of the scores ----

// What a row's derivatives need: g.b_v, and the sum of its probabilities times their derivatives.
struct RowMoments {
  float bias, mean;
};

template <class T>
struct Derivatives {
  const float* probabilities;  // [batch * rows, tokens]
  const RowMoments* moments;   // [batch * rows]
  // For the tokens' gradient, each sample's weights above its derivatives, [batch, 2 rows, coefficient_pitch]; or null.
  T* coefficients;
  int coefficient_pitch;
};

template <class T>
class Derivative {
  const TokenPass<T>& pass;
  const Share<T>& share;
  const Derivatives<T>& given;
  const int row = share.first_row + threadIdx.x / TILE;
  const bool exists = row < pass.rows;
  const float* const probabilities = given.probabilities + (share.first_of_sample + row) * pass.tokens;
  const RowMoments moments = exists ? given.moments[share.first_of_sample + row] : RowMoments{0, 0};
  float probability = 0;

 public:
  static constexpr bool DECAYS = false;
  static constexpr float decay = 1;

  __device__ Derivative(const TokenPass<T>& pass, const Share<T>& share, const Derivatives<T>& given)
      : pass(pass), share(share), given(given) {}

  __device__ void prepare(int token) { probability = exists && token < share.end ? probabilities[token] : 0; }

  __device__ float coefficient(float product, int token) {
    const bool dropped = probability != 0 && !keeps(pass, share.first_of_sample + row, token);
    const float of_probability = dropped ? 0 : pass.kept_scale * (product + moments.bias);
    const float derivative = probability == 0 ? 0 : probability * (of_probability - moments.mean);
    if (given.coefficients && share.group == 0 && exists && token < share.end) {
      T* const target = given.coefficients + (2 * share.first_of_sample + row) * given.coefficient_pitch + token;
      assign(target[0], dropped ? 0 : pass.kept_scale * probability);
      assign(target[int64_t{pass.rows} * given.coefficient_pitch], derivative);
    }
    return derivative;
  }
};

template <class T, class L>
__global__ void __launch_bounds__(TOKEN_THREADS, L::template blocks<T>())
    derive_kernel(const __grid_constant__ TokenPass<T> pass, const __grid_constant__ Derivatives<T> given) {
  const Share<T> share(pass);
  Derivative<T> step(pass, share, given);
  pass_over_tokens<T, L>(pass, share, step);
}

}  // namespace fast_prompt::cuda::compress
