// What every kernel here is made of: tiles of rows in shared memory, fragments of them in a warp's registers, their
// products on tensor cores, and sums over rows. bf16 and fp16 multiply as they are; float32 as three TF32 products.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <ptx.cuh>
#include <type_traits>

namespace fast_prompt::cuda {

// ---- Elements ----

// By the names that FAST_PROMPT_ELEMENT takes.
namespace element {
using float32 = float;
using bfloat16 = __nv_bfloat16;
using float16 = __half;
}  // namespace element

// The 16-bit types, which tensor cores multiply as they are.
template <class T>
using Half = std::enable_if_t<sizeof(T) == 2, T>;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

__device__ inline void assign(float& target, float x) { target = x; }
__device__ inline void assign(__nv_bfloat16& target, float x) { target = __float2bfloat16_rn(x); }
__device__ inline void assign(__half& target, float x) { target = __float2half_rn(x); }

// The power of two at or below a finite, normal, positive number; else 1.
__device__ inline float unit_of(float bound) {
  const uint32_t exponent = __float_as_uint(bound) & 0x7F800000;
  return exponent == 0 || exponent == 0x7F800000 ? 1 : __uint_as_float(exponent);
}

constexpr int PIECE_BYTES = 16;  // what one thread moves at once

template <class T>
struct alignas(PIECE_BYTES) Piece {
  T element[PIECE_BYTES / sizeof(T)];
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// ---- Matrices in global memory ----

constexpr int64_t UNBROKEN = 0x7FFFFFFFFFFFFFFF;  // rows per batch of a matrix that is not a batch of several

// Rows of a [batch, rows_per_batch, width] tensor of any batch and row strides, numbered through; strides in elements.
template <class T>
struct Matrix {
  const T* data;
  int64_t rows_per_batch, batch_stride, row_stride;

  __device__ int64_t offset(int64_t row) const {
    if (row < rows_per_batch) return row * row_stride;
    return row / rows_per_batch * batch_stride + row % rows_per_batch * row_stride;
  }
};

// The same matrix as one that is no batch of several, for the compiler to know.
template <class T>
__device__ inline Matrix<T> unbroken(const Matrix<T>& matrix) {
  return {matrix.data, UNBROKEN, 0, matrix.row_stride};
}

// A matrix's rows from one on, as few as a tile has: one long division does for all of them.
template <class T>
struct RowsFrom {
  const T* first;
  int64_t row_stride, batch_stride, next_batch;  // next_batch: after `first`
  int rows_per_batch, rows_left;                 // rows_left: of the first row's batch

  __device__ RowsFrom(const Matrix<T>& matrix, int64_t row)
      : row_stride(matrix.row_stride), batch_stride(matrix.batch_stride) {
    constexpr int64_t MOST = 0x7FFFFFFF;
    const int64_t batch = row < matrix.rows_per_batch ? 0 : row / matrix.rows_per_batch;
    const int64_t passed = row - batch * matrix.rows_per_batch, left = matrix.rows_per_batch - passed;
    first = matrix.data + batch * batch_stride + passed * row_stride;
    next_batch = batch_stride - passed * row_stride;
    rows_per_batch = static_cast<int>(matrix.rows_per_batch < MOST ? matrix.rows_per_batch : MOST);
    rows_left = static_cast<int>(left < MOST ? left : MOST);
  }

  // Of the first batch.
  __device__ const T* near(int row) const { return first + row * row_stride; }
  __device__ const T* operator[](int row) const {
    if (row < rows_left) return near(row);
    const unsigned over = row - rows_left, batches = over / static_cast<unsigned>(rows_per_batch);
    return first + next_batch + batches * batch_stride + (over - batches * rows_per_batch) * row_stride;
  }
};

// ---- Tiles in shared memory ----

// A row of a tile is 128 bytes of a matrix's row, a chunk, and 16 more to spread the rows over the banks: eight rows
// read by one ldmatrix, or by the lanes of a float32 fragment, then touch 32 different banks.
template <class T>
constexpr int CHUNK = 128 / sizeof(T);
template <class T>
constexpr int PADDING = PIECE_BYTES / sizeof(T);
template <class T>
constexpr int PITCH = CHUNK<T> + PADDING<T>;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body(row, column, count) for the pieces of a [rows, width] matrix that make up the tile at (first_row,
// first_column), `count` of each piece's elements lying inside; rows and columns are the tile's. Threads share them
// out in rounds, whose number the compiler knows.
template <class T, int ROWS, int COLUMNS, int THREADS, int UNROLL = 2, class Body>
__device__ inline void for_each_piece(int thread, int64_t first_row, int64_t rows, int first_column, int width,
                                      Body body) {
  constexpr int LENGTH = PIECE_BYTES / sizeof(T), PIECES = COLUMNS / LENGTH, ALL = ROWS * PIECES;
  static_assert(COLUMNS % LENGTH == 0, "a tile's row is made of whole pieces");
#pragma unroll UNROLL
  for (int first = 0; first < ALL; first += THREADS) {
    const int i = first + thread;
    if (ALL % THREADS != 0 && i >= ALL) break;
    const int row = i / PIECES, column = i % PIECES * LENGTH;
    const int left = first_row + row < rows ? width - first_column - column : 0;
    body(row, column, left < 0 ? 0 : left < LENGTH ? left : LENGTH);
  }
}

// Starts the copy of `count` elements to a piece of a tile, zeros after them. Where `aligned` is false (addresses or
// strides are not multiples of 16 bytes) the copy is done element by element, at once.
template <class T>
__device__ inline void load_piece(T* target, const T* source, int count, bool aligned) {
  if (aligned) {
    ptx::copy_async_16(target, source, count * static_cast<int>(sizeof(T)));
  } else {
#pragma unroll 1
    for (int i = 0; i < PADDING<T>; ++i) target[i] = i < count ? source[i] : T(0.0f);
  }
}

// Starts the copy of a tile, zeros where it lies outside of [rows, width], and in rows that are absent(row). What is
// rare, a tile with rows of two batches or not aligned, is kept small: every copy that a kernel starts stands in its
// code several times.
template <int ROWS, int COLUMNS, int THREADS, class T, class Absent>
__device__ inline void load_tile(T* tile, int pitch, const Matrix<T>& from, int64_t first_row, int64_t rows,
                                 int first_column, int width, bool aligned, int thread, Absent absent) {
  const RowsFrom<T> source(from, first_row);
  if (aligned && (source.rows_left >= ROWS || source.rows_left >= rows - first_row))
    for_each_piece<T, ROWS, COLUMNS, THREADS>(
        thread, first_row, rows, first_column, width, [&](int row, int column, int count) {
          if (count > 0 && absent(row)) count = 0;
          load_piece(tile + row * pitch + column, count > 0 ? source.near(row) + first_column + column : from.data,
                     count, true);
        });
  else
    for_each_piece<T, ROWS, COLUMNS, THREADS, 1>(
        thread, first_row, rows, first_column, width, [&](int row, int column, int count) {
          if (count > 0 && absent(row)) count = 0;
          load_piece(tile + row * pitch + column, count > 0 ? source[row] + first_column + column : from.data, count,
                     aligned);
        });
}

template <int ROWS, int COLUMNS, int THREADS, class T>
__device__ inline void load_tile(T* tile, int pitch, const Matrix<T>& from, int64_t first_row, int64_t rows,
                                 int first_column, int width, bool aligned) {
  load_tile<ROWS, COLUMNS, THREADS>(tile, pitch, from, first_row, rows, first_column, width, aligned, threadIdx.x,
                                    [](int) { return false; });
}

// A warp writes its own [ROWS, COLUMNS] of a tile to a contiguous [rows, width] matrix.
template <int ROWS, int COLUMNS, class T>
__device__ inline void store_warp_tile(T* output, const T* tile, int lane, int64_t first_row, int64_t rows,
                                       int first_column, int width, bool aligned) {
  __syncwarp();
  for_each_piece<T, ROWS, COLUMNS, 32>(
      lane, first_row, rows, first_column, width, [&](int row, int column, int count) {
        const T* source = tile + row * PITCH<T> + column;
        T* target = output + (first_row + row) * width + first_column + column;
        if (aligned && count == PADDING<T>) {
          *reinterpret_cast<Piece<T>*>(target) = *reinterpret_cast<const Piece<T>*>(source);
        } else {
#pragma unroll 1
          for (int i = 0; i < count; ++i) target[i] = source[i];
        }
      });
}

// ---- Fragments: operands of a product, spread over a warp ----

// [16, 16] of the left operand, [16, 8] of the right one.
template <class T>
struct Left {
  uint32_t part[4];
};
template <class T>
struct Right {
  uint32_t part[2];
};

// float32: the two halves in depth, each as the sum of two TF32 numbers.
template <>
struct Left<float> {
  float large[2][4], small[2][4];
};
template <>
struct Right<float> {
  float large[2][2], small[2][2];
};

__device__ inline void split(float x, float& large, float& small) {
  large = ptx::round_to_tf32(x);
  small = ptx::round_to_tf32(x - large);
}

// From a tile with the left operand's rows as rows, [m][k].
template <class T>
__device__ inline void load(Left<T>& left, const Half<T>* tile, int pitch, int lane) {
  ptx::load_matrices(left.part, tile + lane % 16 * pitch + lane / 16 * 8);
}

// From a tile with them as columns, [k][m].
template <class T>
__device__ inline void load_transposed(Left<T>& left, const Half<T>* tile, int pitch, int lane) {
  ptx::load_matrices_transposed(left.part, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
}

// A float32 fragment may come from a tile of any type.
template <class At>
__device__ inline void gather(Left<float>& left, int lane, At at) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      split(at(lane / 4 + i % 2 * 8, half * 8 + lane % 4 + i / 2 * 4), left.large[half][i], left.small[half][i]);
}

template <class E>
__device__ inline void load(Left<float>& left, const E* tile, int pitch, int lane) {
  gather(left, lane, [=](int m, int k) { return to_float(tile[m * pitch + k]); });
}

template <class E>
__device__ inline void load_transposed(Left<float>& left, const E* tile, int pitch, int lane) {
  gather(left, lane, [=](int m, int k) { return to_float(tile[k * pitch + m]); });
}

// N neighbouring right operands, from a tile with their columns as rows, [n][k].
template <class T, int N>
__device__ inline void load(Right<T> (&right)[N], const Half<T>* tile, int pitch, int lane) {
#pragma unroll
  for (int n = 0; n + 1 < N; n += 2) {
    uint32_t parts[4];
    ptx::load_matrices(parts, tile + (n * 8 + lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
    right[n] = {parts[0], parts[1]};
    right[n + 1] = {parts[2], parts[3]};
  }
  if (N % 2) ptx::load_matrices(right[N - 1].part, tile + ((N - 1) * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
}

// From a tile with their columns as columns, [k][n].
template <class T, int N>
__device__ inline void load_transposed(Right<T> (&right)[N], const Half<T>* tile, int pitch, int lane) {
#pragma unroll
  for (int n = 0; n + 1 < N; n += 2) {
    uint32_t parts[4];
    ptx::load_matrices_transposed(parts, tile + lane % 16 * pitch + n * 8 + lane / 16 * 8);
    right[n] = {parts[0], parts[1]};
    right[n + 1] = {parts[2], parts[3]};
  }
  if (N % 2) ptx::load_matrices_transposed(right[N - 1].part, tile + lane % 16 * pitch + (N - 1) * 8);
}

template <int N, class At>
__device__ inline void gather(Right<float> (&right)[N], int lane, At at) {
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        split(at(half * 8 + lane % 4 + i * 4, n * 8 + lane / 4), right[n].large[half][i], right[n].small[half][i]);
}

template <int N, class E>
__device__ inline void load(Right<float> (&right)[N], const E* tile, int pitch, int lane) {
  gather(right, lane, [=](int k, int n) { return to_float(tile[n * pitch + k]); });
}

template <int N, class E>
__device__ inline void load_transposed(Right<float> (&right)[N], const E* tile, int pitch, int lane) {
  gather(right, lane, [=](int k, int n) { return to_float(tile[k * pitch + n]); });
}

// ---- Products ----

// A warp's sums [16 M, 8 N]; ptx.cuh says which lane holds which.
template <int M, int N>
struct Sums {
  float at[M][N][4] = {};
};

__device__ inline void multiply(float (&d)[4], const Left<__nv_bfloat16>& a, const Right<__nv_bfloat16>& b) {
  ptx::multiply_bf16(d, a.part, b.part);
}

__device__ inline void multiply(float (&d)[4], const Left<__half>& a, const Right<__half>& b) {
  ptx::multiply_fp16(d, a.part, b.part);
}

// Three products leave out only small * small, 2^-22 of the whole. Tensor cores round their sums towards zero, which
// long sums in float32 would show, so the running sum is kept outside of them (Ootomo and Yokota, IJHPCA 2022).
__device__ inline void multiply(float (&d)[4], const Left<float>& a, const Right<float>& b) {
  float sum[4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    ptx::multiply_tf32(sum, a.small[half], b.large[half]);
    ptx::multiply_tf32(sum, a.large[half], b.small[half]);
    ptx::multiply_tf32(sum, a.large[half], b.large[half]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] += sum[i];
}

// Where a thread's fragments lie in the tile; see ptx.cuh.
template <class L>
struct Place {
  int lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4;
  int column_warp = threadIdx.x / 32 % L::COLUMN_WARPS;
  int first_row = threadIdx.x / 32 / L::COLUMN_WARPS * L::M * 16;  // of the warp
  int first_column = column_warp * L::N * 8;

  __device__ int row(int slot) const { return first_row + slot / 2 * 16 + slot % 2 * 8 + group; }
};

// Calls body(first, second, slot, column) for each two neighbouring elements of a thread's sums; the column counts from
// the warp's first.
template <int M, int N, class Body>
__device__ inline void for_each_pair(Sums<M, N>& sums, int pair, Body body) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        body(sums.at[m][n][2 * half], sums.at[m][n][2 * half + 1], 2 * m + half, n * 8 + pair * 2);
}

// Writes sums into a tile, rounded; the warp's part of it begins at `tile`.
template <class T, int M, int N>
__device__ inline void write_sums(Sums<M, N>& sums, int pair, int group, T* tile, int pitch) {
  for_each_pair(sums, pair, [&](float first, float second, int slot, int column) {
    auto& target = *reinterpret_cast<Pair<T>*>(tile + (slot / 2 * 16 + slot % 2 * 8 + group) * pitch + column);
    assign(target.first, first);
    assign(target.second, second);
  });
}

// The first `count` of two neighbours; `aligned` says whether a pair can be stored at once.
template <class T>
__device__ inline void store_pair(T* target, float first, float second, int count, bool aligned = true) {
  Pair<T> pair;
  assign(pair.first, first);
  assign(pair.second, second);
  if (count > 1 && aligned) {
    *reinterpret_cast<Pair<T>*>(target) = pair;
  } else {
    if (count > 0) target[0] = pair.first;
    if (count > 1) target[1] = pair.second;
  }
}

// Operands a step of 16 deep: which way a tile lies is in the loader that is passed. The right operands are taken two
// at a time, so that few registers hold them.
template <class T, int M, int N, class LoadRight>
__device__ inline void multiply(Sums<M, N>& sums, const Left<T> (&left)[M], LoadRight load_right) {
#pragma unroll
  for (int n = 0; n + 1 < N; n += 2) {
    Right<T> right[2];
    load_right(right, n);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int m = 0; m < M; ++m) multiply(sums.at[m][n + i], left[m], right[i]);
  }
  if constexpr (N % 2) {
    Right<T> right[1];
    load_right(right, N - 1);
#pragma unroll
    for (int m = 0; m < M; ++m) multiply(sums.at[m][N - 1], left[m], right[0]);
  }
}

// Few products a step do not hide how long their operands take from shared memory: then several steps at once.
template <int PRODUCTS>
constexpr int UNROLLED_STEPS = PRODUCTS <= 8 ? 4 : 1;

// sums += A B^T, A a tile [m][k], B a tile [n][k]; depth is a multiple of 16.
template <class T, int M, int N>
__device__ inline void multiply_by_rows(Sums<M, N>& sums, const T* a, int a_pitch, const T* b, int b_pitch, int depth,
                                        int lane) {
#pragma unroll UNROLLED_STEPS<M * N>
  for (int k = 0; k < depth; k += 16) {
    Left<T> left[M];
#pragma unroll
    for (int m = 0; m < M; ++m) load(left[m], a + m * 16 * a_pitch + k, a_pitch, lane);
    multiply(sums, left, [&](auto& right, int n) { load(right, b + n * 8 * b_pitch + k, b_pitch, lane); });
  }
}

// sums += A B, A a tile [m][k], B a tile [k][n].
template <class T, int M, int N>
__device__ inline void multiply_by_columns(Sums<M, N>& sums, const T* a, int a_pitch, const T* b, int b_pitch,
                                           int depth, int lane) {
#pragma unroll UNROLLED_STEPS<M * N>
  for (int k = 0; k < depth; k += 16) {
    Left<T> left[M];
#pragma unroll
    for (int m = 0; m < M; ++m) load(left[m], a + m * 16 * a_pitch + k, a_pitch, lane);
    multiply(sums, left, [&](auto& right, int n) { load_transposed(right, b + k * b_pitch + n * 8, b_pitch, lane); });
  }
}

// sums += A^T B over 16 rows, A a tile [k][m], B a tile [k][n].
template <class T, int M, int N>
__device__ inline void multiply_transposed(Sums<M, N>& sums, const T* a, int a_pitch, const T* b, int b_pitch,
                                           int lane) {
  Left<T> left[M];
#pragma unroll
  for (int m = 0; m < M; ++m) load_transposed(left[m], a + m * 16, a_pitch, lane);
  multiply(sums, left, [&](auto& right, int n) { load_transposed(right, b + n * 8, b_pitch, lane); });
}

// ---- Sums over lanes, rows and blocks, in a fixed order ----

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
  __device__ float operator()(float a, float b) const { return ptx::max_or_nan(a, b); }
};

// Over the lanes that differ in the bits of LANES: 31 for the warp, 3 for the four that share a row.
template <int LANES, class Operation>
__device__ inline float reduce_lanes(float value, Operation operation) {
#pragma unroll
  for (int bit = 1; bit <= LANES; bit *= 2) value = operation(value, __shfl_xor_sync(0xFFFFFFFF, value, bit));
  return value;
}

// Over the block; every thread gets the result. `exchange` holds a float for each warp and is free again after the
// block's next barrier.
template <int THREADS, class Operation>
__device__ inline float reduce_block(float value, float* exchange, Operation operation) {
  value = reduce_lanes<31>(value, operation);
  if (threadIdx.x % 32 == 0) exchange[threadIdx.x / 32] = value;
  __syncthreads();
  value = exchange[0];
  for (int warp = 1; warp < THREADS / 32; ++warp) value = operation(value, exchange[warp]);
  return value;
}

// ---- Dropout ----

// The first words of Philox 4x32-10 (fast_prompt/reference/philox.py) for a few counters at once. The rounds stay a
// loop: unrolled for every element of a tile they would be most of a kernel's code.
template <int COUNT>
__device__ inline void philox(uint64_t seed, const uint64_t (&index)[COUNT], uint32_t (&word)[COUNT]) {
  uint32_t c1[COUNT], c2[COUNT] = {}, c3[COUNT] = {};
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    word[i] = static_cast<uint32_t>(index[i]);
    c1[i] = static_cast<uint32_t>(index[i] >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll 1
  for (int round = 0; round < 10; ++round) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const uint64_t product0 = uint64_t{0xD2511F53} * word[i], product2 = uint64_t{0xCD9E8D57} * c2[i];
      word[i] = static_cast<uint32_t>(product2 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(product2);
      c2[i] = static_cast<uint32_t>(product0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(product0);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}

}  // namespace fast_prompt::cuda
