// The forward kernel of prompt_diffusion; prompt_diffusion.cu says how its work is laid out.

#pragma once

#include "prompt_diffusion_rows.cuh"

namespace fast_prompt::cuda {
namespace {

template <class T, class L>
class ForwardTiles {
  // The order in which a block needs tiles: for each of its row tiles first the chunks of X and K, block of prompts by
  // block, then for each chunk of H the same chunk of P, block by block. Loading runs STAGES - 1 steps ahead of use,
  // across row tiles, so that memory never waits for arithmetic.
  const Problem<T>& problem;
  T* const stages;
  const int blocks, chunks;
  int64_t row_tile = blockIdx.x;
  int step = 0, free_stage = 0, ready_stage = 0;

 public:
  __device__ ForwardTiles(const Problem<T>& problem, T* stages, int blocks, int chunks)
      : problem(problem), stages(stages), blocks(blocks), chunks(chunks) {
#pragma unroll 1
    for (int i = 0; i < L::STAGES - 1; ++i) load_next();
  }

  // The next stage, filled; until the call after this one.
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
      const bool scoring = step < blocks * chunks;
      const int local_step = scoring ? step : step - blocks * chunks;
      const int chunk = scoring ? local_step % chunks : local_step / blocks;
      const int block = scoring ? local_step / chunks : local_step % blocks;
      const auto& weights = scoring ? problem.keys : problem.prompts;
      if (scoring || block == blocks - 1)
        load_tile<L::ROWS, CHUNK<T>, L::THREADS>(upper, PITCH<T>, scoring ? problem.source : problem.hidden, first_row,
                                                 problem.rows, chunk * CHUNK<T>, problem.width, problem.aligned);
      load_tile<L::COLUMNS, CHUNK<T>, L::THREADS>(lower, PITCH<T>, unbroken(weights), block * L::COLUMNS,
                                                  problem.num_prompts, chunk * CHUNK<T>, problem.width,
                                                  problem.aligned);
      if (++step == 2 * blocks * chunks) {
        step = 0;
        row_tile += gridDim.x;
      }
    }
    ptx::copy_commit();
    free_stage = (free_stage + 1) % L::STAGES;
  }
};

// Whether ReLU's activations, which have no bound, need a unit for each row to be stored as T: beyond float16's largest
// number they would be infinite.
template <class T>
constexpr bool HAS_UNITS = std::is_same<T, __half>::value;

// Several blocks of prompts: brings the coefficients of the earlier ones to the last block's shift (softmax), or unit.
template <class T, class L>
__device__ inline void align_blocks(T* coefficients, int pitch, int blocks, bool softmax, const float* references) {
  __syncthreads();
  const int columns = (blocks - 1) * L::COLUMNS;
  for (int i = threadIdx.x; i < L::ROWS * columns; i += L::THREADS) {
    const int row = i / columns, column = i % columns;
    const float* reference = references + row;
    T& coefficient = coefficients[row * pitch + column];
    const auto ratio = [softmax](float own, float last) {
      return HAS_UNITS<T> && !softmax ? own / last : expf(own - last);
    };
    assign(coefficient, to_float(coefficient) * ratio(reference[column / L::COLUMNS * L::ROWS],
                                                      reference[(blocks - 1) * L::ROWS]));
  }
}

template <class T, class L>
__global__ void __launch_bounds__(L::THREADS, L::BLOCKS)
    forward_kernel(const __grid_constant__ Problem<T> problem, T* output) {
  const Place<L> place;
  const int blocks = L::blocks(problem.num_prompts), chunks = (problem.width + CHUNK<T> - 1) / CHUNK<T>;
  const int pitch = L::template coefficient_pitch<T>(problem.num_prompts);
  T* const stages = reinterpret_cast<T*>(ptx::dynamic_shared());
  T* const coefficients = stages + L::STAGES * L::template STAGE<T>;
  float* const exchange = reinterpret_cast<float*>(coefficients + L::ROWS * pitch);
  float* const references = exchange + 3 * L::ROW_EXCHANGE;  // of each block and row, the shift or the unit
  T* const warp_coefficients = coefficients + place.first_row * pitch;
  constexpr int WARP_CHUNK = CHUNK<T> / L::COLUMN_WARPS;  // columns of a chunk of Y that a warp computes
  const int warp_column = place.column_warp * WARP_CHUNK;

  const float scale = expf(*problem.log_scale);
  ForwardTiles<T, L> tiles(problem, stages, blocks, chunks);
  for (int64_t first_row = int64_t{blockIdx.x} * L::ROWS; first_row < problem.rows;
       first_row += int64_t{gridDim.x} * L::ROWS) {
    RowState<L> state;
    [[maybe_unused]] const auto unit = [&](int slot) { return problem.softmax ? 1 : unit_of(state.largest[slot]); };
    for (int block = 0; block < blocks; ++block) {
      Sums<L::M, L::N> scores;
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const T* rows = tiles.next();
        const T* weights = rows + L::ROWS * PITCH<T>;
        multiply_by_rows(scores, rows + place.first_row * PITCH<T>, PITCH<T>,
                         weights + place.first_column * PITCH<T>, PITCH<T>, CHUNK<T>, place.lane);
      }
      const int first_prompt = block * L::COLUMNS;
      hide_absent_prompts<L>(problem, scores, first_prompt, place);
      if (problem.softmax) shift_to_largest<L>(scores, state, place, exchange);
      activate<L>(problem, scores, state, first_row, first_prompt, place);
      remember<L>(problem, scores, state, place, exchange + L::ROW_EXCHANGE, exchange + 2 * L::ROW_EXCHANGE);
      for_each_score<L>(scores, place, [&](float& activation, int slot, int) {
        activation = kept(activation);
        if constexpr (HAS_UNITS<T>) activation *= 1 / unit(slot);
      });
      write_sums(scores, place.pair, place.group, warp_coefficients + first_prompt + place.first_column, pitch);
      if (place.column_warp == 0 && place.pair == 0)
        for (int slot = 0; slot < L::SLOTS; ++slot)
          references[block * L::ROWS + place.row(slot)] =
              HAS_UNITS<T> && !problem.softmax ? unit(slot) : state.shift[slot];
    }
    if ((problem.softmax || HAS_UNITS<T>) && blocks > 1)
      align_blocks<T, L>(coefficients, pitch, blocks, problem.softmax, references);

    float factor[L::SLOTS];
#pragma unroll
    for (int slot = 0; slot < L::SLOTS; ++slot)
      factor[slot] = row_factor<L>(problem, state, slot, scale) * normalizer<L>(problem, state, slot);
    if constexpr (HAS_UNITS<T>)
      for (int slot = 0; slot < L::SLOTS; ++slot) factor[slot] *= unit(slot);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      Sums<L::M, WARP_CHUNK / 8> sums;
      T* rows = nullptr;
      for (int block = 0; block < blocks; ++block) {
        rows = tiles.next();
        multiply_by_columns(sums, warp_coefficients + block * L::COLUMNS, pitch,
                            rows + L::ROWS * PITCH<T> + warp_column, PITCH<T>,
                            depth_of<L>(block, problem.num_prompts), place.lane);
      }
      // Y takes the place of H in the tile, and leaves in whole pieces.
      T* const result = rows + place.first_row * PITCH<T> + warp_column;
      for_each_pair(sums, place.pair, [&](float& first, float& second, int slot, int column) {
        const int row = slot / 2 * 16 + slot % 2 * 8 + place.group;
        const auto& hidden = *reinterpret_cast<const Pair<T>*>(result + row * PITCH<T> + column);
        first = scale * to_float(hidden.first) + factor[slot] * first;
        second = scale * to_float(hidden.second) + factor[slot] * second;
      });
      write_sums(sums, place.pair, place.group, result, PITCH<T>);
      store_warp_tile<L::M * 16, WARP_CHUNK>(output, result, place.lane, first_row + place.first_row, problem.rows,
                                             chunk * CHUNK<T> + warp_column, problem.width, problem.aligned);
    }
  }
  ptx::copy_wait<0>();
}

}  // namespace
}  // namespace fast_prompt::cuda
