// The backward kernels of prompt_diffusion; prompt_diffusion.cu says how their work is laid out.

#pragma once

#include "prompt_diffusion_rows.cuh"

namespace fast_prompt::cuda {
namespace {

// ---- Row tiles: dX, dH, and what the gradients of P, K and s need of each row ----

// Null where not wanted. The coefficients are e^s w R for dP and dS for dK, [rows, coefficient_pitch]; those of a tile
// are divided by a power of two, its unit, so that fp16 neither overflows nor underflows.
template <class T>
struct RowGradients {
  Matrix<T> grad, output;
  T *hidden, *source;
  T *prompt_coefficients, *key_coefficients;
  float *prompt_units, *key_units;  // [row tiles]
  float* log_scale;                 // [row tiles], each tile's part
  int coefficient_pitch;

  __device__ bool need_products() const { return source || key_coefficients; }
  __device__ bool need_scores() const { return need_products() || prompt_coefficients; }
  __device__ bool need_grad() const { return need_products() || hidden || log_scale; }
};

template <class T, class L>
class BackwardTiles {
  // The order in which a block needs tiles: for each of its row tiles, for each block of prompts, the chunks of X and
  // K, then those of G and P (each chunk twice where rounding left a rest of the weights); all of it twice where there
  // are several blocks, since only then their common maximum and sum are known; and last, chunk by chunk, the blocks of
  // K.
  const Problem<T>& problem;
  const RowGradients<T>& gradients;
  T* const stages;
  const int chunks, blocks, parts, score_steps, block_steps, pass_steps, tile_steps;
  int64_t row_tile = blockIdx.x;
  int step = 0, free_stage = 0, ready_stage = 0;

 public:
  __device__ BackwardTiles(const Problem<T>& problem, const RowGradients<T>& gradients, T* stages, int blocks,
                           int chunks)
      : problem(problem),
        gradients(gradients),
        stages(stages),
        chunks(chunks),
        blocks(blocks),
        parts(problem.parts()),
        score_steps(gradients.need_scores() ? chunks * parts : 0),
        block_steps(score_steps + (gradients.need_grad() ? chunks * parts : 0)),
        pass_steps((blocks > 1 ? 2 : 1) * blocks * block_steps),
        tile_steps(pass_steps + (gradients.source ? chunks * blocks : 0)) {
#pragma unroll 1
    for (int i = 0; i < L::STAGES - 1; ++i) load_next();
  }

  __device__ T* next() {
    ptx::copy_wait<L::STAGES - 2>();
    __syncthreads();
    load_next();
    T* stage = stages + ready_stage * L::template STAGE<T>;
    ready_stage = (ready_stage + 1) % L::STAGES;
    return stage;
  }

 private:
  __device__ void load_next() {
    const int64_t first_row = row_tile * L::ROWS;
    if (first_row < problem.rows) {
      T* upper = stages + free_stage * L::template STAGE<T>;
      T* lower = upper + L::ROWS * PITCH<T>;
      int block = (step - pass_steps) % blocks, chunk = (step - pass_steps) / blocks;
      const Matrix<T>*rows = nullptr, *weights = &problem.keys;
      if (step < pass_steps) {
        block = step / block_steps % blocks;
        const int block_step = step % block_steps;
        const bool scoring = block_step < score_steps;
        const int chunk_step = scoring ? block_step : block_step - score_steps;
        chunk = chunk_step / parts;
        rows = scoring ? &problem.source : &gradients.grad;
        weights = chunk_step % parts == 0 ? scoring ? &problem.keys : &problem.prompts
                  : scoring               ? &problem.keys_rest
                                          : &problem.prompts_rest;
      }
      if (rows)
        load_tile<L::ROWS, CHUNK<T>, L::THREADS>(upper, PITCH<T>, *rows, first_row, problem.rows, chunk * CHUNK<T>,
                                                 problem.width, problem.aligned);
      load_tile<L::COLUMNS, CHUNK<T>, L::THREADS>(lower, PITCH<T>, unbroken(*weights), block * L::COLUMNS,
                                                  problem.num_prompts, chunk * CHUNK<T>, problem.width,
                                                  problem.aligned);
      if (++step == tile_steps) {
        step = 0;
        row_tile += gridDim.x;
      }
    }
    ptx::copy_commit();
    free_stage = (free_stage + 1) % L::STAGES;
  }
};

// dH = e^s G for a chunk of G in shared memory; returns the thread's part of sum(G * Y) if that is wanted.
template <class T, class L>
__device__ inline float pass_grad_on(const Problem<T>& problem, const RowGradients<T>& gradients, const T* tile,
                                     int64_t first_row, int chunk, float scale) {
  float overlap = 0;
  const RowsFrom<T> output_rows(gradients.output, first_row);
  for_each_piece<T, L::ROWS, CHUNK<T>, L::THREADS, 1>(
      threadIdx.x, first_row, problem.rows, chunk * CHUNK<T>, problem.width, [&](int row, int column, int count) {
        if (count == 0) return;
        const int64_t global_row = first_row + row, global_column = chunk * CHUNK<T> + column;
        const T* grad = tile + row * PITCH<T> + column;
        const T* output = output_rows[row] + global_column;
        T* result = gradients.hidden + global_row * problem.width + global_column;
        if (problem.aligned && count == PADDING<T>) {
          const Piece<T> g = *reinterpret_cast<const Piece<T>*>(grad);
          if (gradients.log_scale) {
            const Piece<T> y = *reinterpret_cast<const Piece<T>*>(output);
#pragma unroll
            for (int i = 0; i < PADDING<T>; ++i) overlap += to_float(g.element[i]) * to_float(y.element[i]);
          }
          if (gradients.hidden) {
            Piece<T> scaled;
#pragma unroll
            for (int i = 0; i < PADDING<T>; ++i) assign(scaled.element[i], scale * to_float(g.element[i]));
            *reinterpret_cast<Piece<T>*>(result) = scaled;
          }
        } else {
#pragma unroll 1
          for (int i = 0; i < count; ++i) {
            if (gradients.log_scale) overlap += to_float(grad[i]) * to_float(output[i]);
            if (gradients.hidden) assign(result[i], scale * to_float(grad[i]));
          }
        }
      });
  return overlap;
}

// What the backward must know of a thread's rows beyond RowState, once all blocks of prompts are summed up.
template <class L>
struct RowDerivative {
  float moment[L::SLOTS] = {};    // sum(R * dR), at first with kept activations for R and D for dR
  float steepest[L::SLOTS] = {};  // max |D|
  float factor[L::SLOTS];         // e^s w
  float normalizer[L::SLOTS];
  float prompt_unit = 1, key_unit = 1;

  // Adds a block's signed activations and its products D = G P^T.
  __device__ void remember(Sums<L::M, L::N>& activations, Sums<L::M, L::N>& products, const RowState<L>& state,
                           const Place<L>& place, float* moment_exchange, float* steepest_exchange) {
    float sum[L::SLOTS] = {}, largest[L::SLOTS] = {};
#pragma unroll
    for (int m = 0; m < L::M; ++m)
#pragma unroll
      for (int n = 0; n < L::N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int slot = 2 * m + i / 2;
          sum[slot] += kept(activations.at[m][n][i]) * products.at[m][n][i];
          largest[slot] = ptx::max_or_nan(largest[slot], fabsf(products.at[m][n][i]));
        }
    reduce_rows<L>(sum, place, moment_exchange, Add());
    reduce_rows<L>(largest, place, steepest_exchange, Larger());
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot) {
      moment[slot] = moment[slot] * state.decay[slot] + sum[slot];
      steepest[slot] = ptx::max_or_nan(steepest[slot], largest[slot]);
    }
  }

  // After the last block. `exchange` holds two floats for each warp.
  template <class T>
  __device__ void finish(const Problem<T>& problem, const RowState<L>& state, float scale, float* exchange) {
    float prompt_bound = 0, key_bound = 0;
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot) {
      normalizer[slot] = cuda::normalizer<L>(problem, state, slot);
      factor[slot] = row_factor<L>(problem, state, slot, scale);
      moment[slot] *= factor[slot] * normalizer[slot];
      prompt_bound = fmaxf(prompt_bound, factor[slot] * normalizer[slot] * state.largest[slot]);
      key_bound = fmaxf(key_bound, factor[slot] * problem.kept_scale * steepest[slot]);
    }
    prompt_unit = unit_of(reduce_block<L::THREADS>(prompt_bound, exchange, Larger()));
    key_unit = unit_of(reduce_block<L::THREADS>(key_bound, exchange + L::WARPS, Larger()));
  }

  // An element of dS from the signed activation and D.
  template <class T>
  __device__ float of_score(const Problem<T>& problem, float activation, float product, int slot) const {
    const float of_activation = factor[slot] * problem.kept_scale * product;
    if (!problem.softmax) return activation <= 0 ? 0 : of_activation;  // keeps NaN
    const float probability = fabsf(activation) * normalizer[slot] / problem.kept_scale;
    return probability * ((activation < 0 ? 0 : of_activation) - moment[slot]);
  }
};

// Turns signed activations and D into the coefficients of dP, dK and dX; the last ones end in `tile` as well.
template <class T, class L>
__device__ inline void write_coefficients(const Problem<T>& problem, const RowGradients<T>& gradients,
                                          const RowDerivative<L>& derivative, Sums<L::M, L::N>& activations,
                                          Sums<L::M, L::N>& products, int64_t first_row, int first_prompt,
                                          const Place<L>& place, T* tile, int pitch) {
  const auto stored = [&](int slot, int column) {  // how many of a pair of elements exist
    const int left = problem.num_prompts - first_prompt - place.first_column - column;
    return first_row + place.row(slot) < problem.rows ? left : 0;
  };
  const auto offset = [&](int slot, int column) {
    return (first_row + place.row(slot)) * gradients.coefficient_pitch + first_prompt + place.first_column + column;
  };
  const float per_key_unit = 1 / derivative.key_unit, per_prompt_unit = 1 / derivative.prompt_unit;
#pragma unroll
  for (int m = 0; m < L::M; ++m)
#pragma unroll
    for (int n = 0; n < L::N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = 2 * m + i / 2;
        float &activation = activations.at[m][n][i], &product = products.at[m][n][i];
        product = derivative.of_score(problem, activation, product, slot) * per_key_unit;
        activation = derivative.factor[slot] * derivative.normalizer[slot] * kept(activation) * per_prompt_unit;
      }
  if (gradients.prompt_coefficients)
    for_each_pair(activations, place.pair, [&](float first, float second, int slot, int column) {
      store_pair(gradients.prompt_coefficients + offset(slot, column), first, second, stored(slot, column));
    });
  if (gradients.key_coefficients)
    for_each_pair(products, place.pair, [&](float first, float second, int slot, int column) {
      store_pair(gradients.key_coefficients + offset(slot, column), first, second, stored(slot, column));
    });
  T* const warp_tile = tile + place.first_row * pitch + first_prompt + place.first_column;
  if (gradients.source) write_sums(products, place.pair, place.group, warp_tile, pitch);
}

// dX = dS K for a row tile, chunk by chunk.
template <class T, class L>
__device__ inline void write_source_gradient(const Problem<T>& problem, const RowGradients<T>& gradients,
                                             BackwardTiles<T, L>& tiles, const T* coefficients, int pitch, float unit,
                                             int64_t first_row, const Place<L>& place) {
  constexpr int WARP_CHUNK = CHUNK<T> / L::COLUMN_WARPS;  // columns of a chunk that a warp computes
  const int warp_column = place.column_warp * WARP_CHUNK;
  const int blocks = L::blocks(problem.num_prompts), chunks = (problem.width + CHUNK<T> - 1) / CHUNK<T>;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    Sums<L::M, WARP_CHUNK / 8> sums;
    T* rows = nullptr;
    for (int block = 0; block < blocks; ++block) {
      rows = tiles.next();
      multiply_by_columns(sums, coefficients + place.first_row * pitch + block * L::COLUMNS, pitch,
                          rows + L::ROWS * PITCH<T> + warp_column, PITCH<T>,
                          depth_of<L>(block, problem.num_prompts), place.lane);
    }
    for_each_pair(sums, place.pair, [&](float& first, float& second, int, int) {
      first *= unit;
      second *= unit;
    });
    T* const result = rows + place.first_row * PITCH<T> + warp_column;  // where no rows were loaded
    write_sums(sums, place.pair, place.group, result, PITCH<T>);
    store_warp_tile<L::M * 16, WARP_CHUNK>(gradients.source, result, place.lane, first_row + place.first_row,
                                           problem.rows, chunk * CHUNK<T> + warp_column, problem.width,
                                           problem.aligned);
  }
}

template <class T, class L>
__global__ void __launch_bounds__(L::THREADS, L::BLOCKS)
    backward_rows_kernel(const __grid_constant__ Problem<T> problem,
                         const __grid_constant__ RowGradients<T> gradients) {
  const Place<L> place;
  const int blocks = L::blocks(problem.num_prompts), chunks = (problem.width + CHUNK<T> - 1) / CHUNK<T>;
  const int pitch = L::template coefficient_pitch<T>(problem.num_prompts);
  T* const stages = reinterpret_cast<T*>(ptx::dynamic_shared());
  T* const coefficients = stages + L::STAGES * L::template STAGE<T>;
  float* const exchange = reinterpret_cast<float*>(coefficients + L::ROWS * pitch);
  float* const block_exchange = exchange + L::ROW_EXCHANGES * L::ROW_EXCHANGE;

  const float scale = expf(*problem.log_scale);
  const int parts = problem.parts(), passes = blocks > 1 ? 2 : 1;
  BackwardTiles<T, L> tiles(problem, gradients, stages, blocks, chunks);
  for (int64_t row_tile = blockIdx.x; row_tile * L::ROWS < problem.rows; row_tile += gridDim.x) {
    const int64_t first_row = row_tile * L::ROWS;
    float overlap = 0;
    RowState<L> state;
    RowDerivative<L> derivative;
    for (int turn = 0; turn < passes * blocks; ++turn) {
      const int block = turn % blocks, first_prompt = block * L::COLUMNS;
      const bool first_pass = turn < blocks, last_pass = turn >= (passes - 1) * blocks;
      Sums<L::M, L::N> scores, products;
      for (int step = 0; gradients.need_scores() && step < chunks * parts; ++step) {
        const T* rows = tiles.next();
        multiply_by_rows(scores, rows + place.first_row * PITCH<T>, PITCH<T>,
                         rows + (L::ROWS + place.first_column) * PITCH<T>, PITCH<T>, CHUNK<T>, place.lane);
      }
      for (int step = 0; gradients.need_grad() && step < chunks * parts; ++step) {
        const T* rows = tiles.next();
        if (turn == 0 && step % parts == 0)
          overlap += pass_grad_on<T, L>(problem, gradients, rows, first_row, step / parts, scale);
        if (gradients.need_products())
          multiply_by_rows(products, rows + place.first_row * PITCH<T>, PITCH<T>,
                           rows + (L::ROWS + place.first_column) * PITCH<T>, PITCH<T>, CHUNK<T>, place.lane);
      }
      if (!gradients.need_scores()) continue;
      hide_absent_prompts<L>(problem, scores, first_prompt, place);
      if (problem.softmax && first_pass) shift_to_largest<L>(scores, state, place, exchange);
      activate<L>(problem, scores, state, first_row, first_prompt, place);
      if (first_pass) {
        remember<L>(problem, scores, state, place, exchange + L::ROW_EXCHANGE, exchange + 2 * L::ROW_EXCHANGE);
        derivative.remember(scores, products, state, place, exchange + 3 * L::ROW_EXCHANGE,
                            exchange + 4 * L::ROW_EXCHANGE);
      }
      if (last_pass && block == 0) derivative.finish(problem, state, scale, block_exchange);
      if (last_pass)
        write_coefficients<T, L>(problem, gradients, derivative, scores, products, first_row, first_prompt, place,
                                 coefficients, pitch);
    }

    if (gradients.log_scale) {
      const float part = reduce_block<L::THREADS>(overlap, block_exchange + 2 * L::WARPS, Add());
      if (threadIdx.x == 0) gradients.log_scale[row_tile] = part;
    }
    if (threadIdx.x == 0 && gradients.prompt_units) gradients.prompt_units[row_tile] = derivative.prompt_unit;
    if (threadIdx.x == 0 && gradients.key_units) gradients.key_units[row_tile] = derivative.key_unit;

    if (gradients.source)
      write_source_gradient<T, L>(problem, gradients, tiles, coefficients, pitch, derivative.key_unit, first_row,
                                  place);
  }
  ptx::copy_wait<0>();
}

// ---- dP = sum over rows of (e^s w R)^T G, dK of dS^T X: parts of the sums ----

// One of the two, as [num_prompts, width] for each split of the rows.
template <class T>
struct WeightGradient {
  Matrix<T> coefficients, activations;
  const float* units;
  float* parts;
};

template <class T>
struct WeightGradients {
  WeightGradient<T> wanted[2];
  int64_t rows, split_rows;  // split_rows is a multiple of SPLIT_STEP
  int unit_rows;             // rows that share a unit: 16, 32 or 64
  int width, num_prompts;
  bool aligned;
};

constexpr int SPLIT_STEP = 64;  // rows of a stage

// ROW_WARPS x COLUMN_WARPS warps take [PROMPTS, CHUNK] of the gradient, each [16 M, 8 N] of it.
template <class T, int ROW_WARPS_, int COLUMN_WARPS_, int M_>
struct WeightLayout {
  static constexpr int ROW_WARPS = ROW_WARPS_, COLUMN_WARPS = COLUMN_WARPS_, M = M_;
  static constexpr int N = CHUNK<T> / COLUMN_WARPS / 8, THREADS = 32 * ROW_WARPS * COLUMN_WARPS;
  static constexpr int PROMPTS = ROW_WARPS * M * 16, COEFFICIENT_PITCH = PROMPTS + 8;
  static constexpr int STAGE = SPLIT_STEP * (COEFFICIENT_PITCH + PITCH<T>);
  // Within the 99 KiB that a block may have on the smallest chips (sm_86, sm_89, sm_120).
  static constexpr int STAGES = 3 * STAGE * sizeof(T) <= 99 << 10 ? 3 : 2;
  static constexpr int64_t shared_bytes() { return int64_t{STAGES} * STAGE * sizeof(T); }
};

// Grid: x the [PROMPTS, CHUNK] tiles, y the splits, z which of the wanted gradients.
template <class T, class L>
__global__ void __launch_bounds__(L::THREADS, 2)
    weight_gradients_kernel(const __grid_constant__ WeightGradients<T> all) {
  const WeightGradient<T>& task = all.wanted[blockIdx.z];
  T* const stages = reinterpret_cast<T*>(ptx::dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int chunks = (all.width + CHUNK<T> - 1) / CHUNK<T>;
  const int first_prompt = blockIdx.x / chunks * L::PROMPTS, first_column = blockIdx.x % chunks * CHUNK<T>;
  const int warp_prompt = warp / L::COLUMN_WARPS * L::M * 16, warp_column = warp % L::COLUMN_WARPS * L::N * 8;
  const int64_t begin = blockIdx.y * all.split_rows;
  const int64_t end = begin + all.split_rows < all.rows ? begin + all.split_rows : all.rows;

  int64_t next_row = begin;
  int free_stage = 0, ready_stage = 0;
  const auto load_next = [&] {
    if (next_row < end) {
      T* coefficients = stages + free_stage * L::STAGE;
      T* activations = coefficients + SPLIT_STEP * L::COEFFICIENT_PITCH;
      load_tile<SPLIT_STEP, L::PROMPTS, L::THREADS>(coefficients, L::COEFFICIENT_PITCH, unbroken(task.coefficients),
                                                    next_row, end, first_prompt, all.num_prompts, true);
      load_tile<SPLIT_STEP, CHUNK<T>, L::THREADS>(activations, PITCH<T>, task.activations, next_row, end, first_column,
                                                  all.width, all.aligned);
      next_row += SPLIT_STEP;
    }
    ptx::copy_commit();
    free_stage = (free_stage + 1) % L::STAGES;
  };
#pragma unroll 1
  for (int i = 0; i < L::STAGES - 1; ++i) load_next();

  Sums<L::M, L::N> sums, part;
  for (int64_t row = begin; row < end; row += SPLIT_STEP) {
    ptx::copy_wait<L::STAGES - 2>();
    __syncthreads();
    load_next();
    const T* coefficients = stages + ready_stage * L::STAGE;
    const T* activations = coefficients + SPLIT_STEP * L::COEFFICIENT_PITCH;
    ready_stage = (ready_stage + 1) % L::STAGES;
#pragma unroll 1
    for (int k = 0; k < SPLIT_STEP && row + k < end; k += 16) {
      multiply_transposed(part, coefficients + k * L::COEFFICIENT_PITCH + warp_prompt, L::COEFFICIENT_PITCH,
                          activations + k * PITCH<T> + warp_column, PITCH<T>, lane);
      if ((k + 16) % all.unit_rows != 0 && row + k + 16 < end) continue;
      const float unit = task.units[(row + k) / all.unit_rows];
#pragma unroll
      for (int m = 0; m < L::M; ++m)
#pragma unroll
        for (int n = 0; n < L::N; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums.at[m][n][i] += unit * part.at[m][n][i];
            part.at[m][n][i] = 0;
          }
    }
  }
  ptx::copy_wait<0>();

  float* const parts = task.parts + int64_t{blockIdx.y} * all.num_prompts * all.width;
  for_each_pair(sums, lane % 4, [&](float first, float second, int slot, int pair_column) {
    const int prompt = first_prompt + warp_prompt + slot / 2 * 16 + slot % 2 * 8 + lane / 4;
    const int column = first_column + warp_column + pair_column;
    if (prompt >= all.num_prompts) return;
    if (column < all.width) parts[int64_t{prompt} * all.width + column] = first;
    if (column + 1 < all.width) parts[int64_t{prompt} * all.width + column + 1] = second;
  });
}

// ---- The parts, added up in a fixed order ----

template <class W>
struct Reduction {
  const float* parts[2];  // [splits, elements]
  W* results[2];
  int wanted, splits;
  int64_t elements;
  const float* log_scale_parts;  // [row tiles]; null if not wanted
  float* log_scale;
  int64_t row_tiles;
};

constexpr int REDUCTION_THREADS = 256;

// Grid: x the elements, y which gradient; the last y adds up log_scale's.
template <class W>
__global__ void __launch_bounds__(REDUCTION_THREADS) reduce_kernel(const __grid_constant__ Reduction<W> all) {
  if (static_cast<int>(blockIdx.y) < all.wanted) {
    const int64_t i = int64_t{blockIdx.x} * REDUCTION_THREADS + threadIdx.x;
    if (i >= all.elements) return;
    float sum = 0;
    for (int split = 0; split < all.splits; ++split) sum += all.parts[blockIdx.y][split * all.elements + i];
    assign(all.results[blockIdx.y][i], sum);
  } else if (blockIdx.x == 0) {
    double* const sums = reinterpret_cast<double*>(ptx::dynamic_shared());
    double sum = 0;
    for (int64_t i = threadIdx.x; i < all.row_tiles; i += REDUCTION_THREADS) sum += all.log_scale_parts[i];
    sums[threadIdx.x] = sum;
    for (int half = REDUCTION_THREADS / 2; half > 0; half /= 2) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *all.log_scale = static_cast<float>(sums[0]);
  }
}

}  // namespace
}  // namespace fast_prompt::cuda
