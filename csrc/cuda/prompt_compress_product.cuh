// Many small matrix products at once, one for each head or sample: all that prompt_compress does with its projections.

#pragma once

#include "tile.cuh"

namespace fast_prompt::cuda::compress {

// A matrix for each z, `step` elements after the one before.
template <class E>
struct Stack {
  Matrix<E> matrix;
  int64_t step;
  bool aligned;  // every row of every matrix begins at a multiple of 16 bytes

  __device__ Matrix<E> at(int64_t z) const {
    return {matrix.data + z * step, matrix.rows_per_batch, matrix.batch_stride, matrix.row_stride};
  }
};

// result[z] = scale * row_scale[z] * left[z] right[z] + row_bias[z] (x) bias[z], [rows, columns]; the right operand is
// zero from `columns` on, where results are stored as well up to `stored_columns`.
template <class A, class B, class C>
struct Product {
  int64_t rows, depth;
  int columns, stored_columns;
  Stack<A> left;
  Stack<B> right;
  Stack<C> result;  // written
  float scale;
  Stack<float> row_scale, row_bias;  // one column each; data is null where absent
  const B* bias;                     // [z, columns]; read where row_bias is given
};

// How the operands lie: the left one as [rows, depth] or [depth, rows], the right one as [depth, columns] or
// [columns, depth]. A block of threads takes [ROWS, COLUMNS] of a result, each of its 2 x 2 warps a quarter.
template <int LEFT_BY_DEPTH_, int RIGHT_BY_COLUMN_>
struct ProductLayout {
  static constexpr int LEFT_BY_DEPTH = LEFT_BY_DEPTH_, RIGHT_BY_COLUMN = RIGHT_BY_COLUMN_;
  static constexpr int ROWS = 32, COLUMNS = 32, DEPTH = 64, THREADS = 128, STAGES = 3, BLOCKS = 4;
  static constexpr int LEFT_HEIGHT = LEFT_BY_DEPTH ? DEPTH : ROWS, LEFT_WIDTH = LEFT_BY_DEPTH ? ROWS : DEPTH;
  static constexpr int RIGHT_HEIGHT = RIGHT_BY_COLUMN ? COLUMNS : DEPTH;
  static constexpr int RIGHT_WIDTH = RIGHT_BY_COLUMN ? DEPTH : COLUMNS;

  template <class A>
  static constexpr int LEFT_PITCH = LEFT_WIDTH + PADDING<A>;
  template <class B>
  static constexpr int RIGHT_PITCH = RIGHT_WIDTH + PADDING<B>;
  template <class A>
  static constexpr int LEFT_BYTES = LEFT_HEIGHT * LEFT_PITCH<A> * sizeof(A);
  template <class A, class B>
  static constexpr int STAGE_BYTES = LEFT_BYTES<A> + RIGHT_HEIGHT * RIGHT_PITCH<B> * sizeof(B);
};

// Rows and depth of an operand's tile at (row, depth), whichever way it lies.
template <int HEIGHT, int WIDTH, int THREADS, bool BY_DEPTH, class E>
__device__ inline void load_operand(E* tile, const Matrix<E>& from, int64_t row, int64_t rows, int64_t depth,
                                    int64_t depths, bool aligned) {
  const int64_t height = BY_DEPTH ? depths : rows, width = BY_DEPTH ? rows : depths;
  load_tile<HEIGHT, WIDTH, THREADS>(tile, WIDTH + PADDING<E>, from, BY_DEPTH ? depth : row, height,
                                    static_cast<int>(BY_DEPTH ? row : depth), static_cast<int>(width), aligned);
}

// A warp's sums, [16, 16] of result z.
template <class A, class B, class C>
__device__ inline void store_product(const Product<A, B, C>& all, Sums<1, 2>& sums, int64_t z, int64_t first_row,
                                     int first_column) {
  const int lane = threadIdx.x % 32;
  const Matrix<C> result = all.result.at(z);
  const Matrix<float> row_scale = all.row_scale.at(z), row_bias = all.row_bias.at(z);
  for_each_pair(sums, lane % 4, [&](float first, float second, int slot, int pair_column) {
    const int64_t row = first_row + slot * 8 + lane / 4;
    if (row >= all.rows) return;
    const float scale = all.row_scale.matrix.data ? all.scale * row_scale.data[row_scale.offset(row)] : all.scale;
    const float weight = all.row_bias.matrix.data ? row_bias.data[row_bias.offset(row)] : 0;
    C* const target = const_cast<C*>(result.data) + result.offset(row);
    const auto finished = [&](float sum, int column) {
      const bool biased = weight != 0 && column < all.columns;
      return scale * sum + (biased ? weight * to_float(all.bias[z * all.columns + column]) : 0);
    };
    const int column = first_column + pair_column;
    const int present = all.stored_columns - column;
    if (present > 1 && all.result.aligned) {
      auto& pair = *reinterpret_cast<Pair<C>*>(target + column);
      assign(pair.first, finished(first, column));
      assign(pair.second, finished(second, column + 1));
    } else {
      if (present > 0) assign(target[column], finished(first, column));
      if (present > 1) assign(target[column + 1], finished(second, column + 1));
    }
  });
}

// Elements of the two types multiply as they are where they are of one type, else as float32.
template <class A, class B, class C, class L>
__global__ void __launch_bounds__(L::THREADS, L::BLOCKS)
    product_kernel(const __grid_constant__ Product<A, B, C> all) {
  using F = std::conditional_t<std::is_same<A, B>::value, A, float>;
  unsigned char* const stages = ptx::dynamic_shared();
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 64 * 16, warp_column = threadIdx.x / 32 % 2 * 16;
  const int64_t column_tiles = ceil_div(all.stored_columns, L::COLUMNS), tile = blockIdx.x / column_tiles;
  const int first_column = static_cast<int>(blockIdx.x % column_tiles) * L::COLUMNS;
  const int64_t row_tiles = ceil_div(all.rows, L::ROWS), z = tile / row_tiles, first_row = tile % row_tiles * L::ROWS;
  const Matrix<A> left = all.left.at(z);
  const Matrix<B> right = all.right.at(z);

  int64_t next_depth = 0;
  int free_stage = 0, ready_stage = 0;
  const auto load_next = [&] {
    if (next_depth < all.depth) {
      unsigned char* const stage = stages + free_stage * L::template STAGE_BYTES<A, B>;
      load_operand<L::LEFT_HEIGHT, L::LEFT_WIDTH, L::THREADS, L::LEFT_BY_DEPTH>(
          reinterpret_cast<A*>(stage), left, first_row, all.rows, next_depth, all.depth, all.left.aligned);
      load_operand<L::RIGHT_HEIGHT, L::RIGHT_WIDTH, L::THREADS, !L::RIGHT_BY_COLUMN>(
          reinterpret_cast<B*>(stage + L::template LEFT_BYTES<A>), right, first_column, all.columns, next_depth,
          all.depth, all.right.aligned);
      next_depth += L::DEPTH;
    }
    ptx::copy_commit();
    free_stage = (free_stage + 1) % L::STAGES;
  };
#pragma unroll 1
  for (int i = 0; i < L::STAGES - 1; ++i) load_next();

  Sums<1, 2> sums;
  constexpr int LEFT_PITCH = L::template LEFT_PITCH<A>, RIGHT_PITCH = L::template RIGHT_PITCH<B>;
  for (int64_t depth = 0; depth < all.depth; depth += L::DEPTH) {
    ptx::copy_wait<L::STAGES - 2>();
    __syncthreads();
    load_next();
    const unsigned char* const stage = stages + ready_stage * L::template STAGE_BYTES<A, B>;
    const A* const a = reinterpret_cast<const A*>(stage);
    const B* const b = reinterpret_cast<const B*>(stage + L::template LEFT_BYTES<A>);
    ready_stage = (ready_stage + 1) % L::STAGES;
#pragma unroll 1
    for (int k = 0; k < L::DEPTH && depth + k < all.depth; k += 16) {
      Left<F> operand[1];
      if constexpr (L::LEFT_BY_DEPTH)
        load_transposed(operand[0], a + k * LEFT_PITCH + warp_row, LEFT_PITCH, lane);
      else
        load(operand[0], a + warp_row * LEFT_PITCH + k, LEFT_PITCH, lane);
      multiply(sums, operand, [&](auto& other, int n) {
        if constexpr (L::RIGHT_BY_COLUMN)
          load(other, b + (warp_column + n * 8) * RIGHT_PITCH + k, RIGHT_PITCH, lane);
        else
          load_transposed(other, b + k * RIGHT_PITCH + warp_column + n * 8, RIGHT_PITCH, lane);
      });
    }
  }
  ptx::copy_wait<0>();

  store_product(all, sums, z, first_row + warp_row, first_column + warp_column);
}

}  // namespace fast_prompt::cuda::compress
