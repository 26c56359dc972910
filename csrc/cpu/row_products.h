// Two products of rows that lie anywhere, each found through a pointer. Nothing is packed: rows are read where they
// are, along their length, and a row that is padding has no pointer.
//
//   row_dots   C(i, j) = A_i . B_j
//   row_sums   C_i (+)= sum over k of A(i, k) B_k
//
// Rows hold words (gemm.h), as many as whole panels of columns take, the last ones zero.

#pragma once

#include "gemm.h"

namespace {

// Words of a row of `elements`.
template <class Dot>
inline int64_t row_words(int64_t elements) {
  return round_up(elements, PANEL) / Dot::DEPTH;
}

// `count` elements as a row of words.
template <class Dot>
inline void stage_row(Dtype dtype, const void* source, int64_t count, float* target) {
  store(target + row_words<Dot>(count) - LANES, Floats{});
  stage<Dot>(dtype, source, count, target);
}

// ---- row_dots: a block of sums in registers for the whole length ----

constexpr int DOT_ROWS = LANES == 16 ? 6 : 3, DOT_COLUMNS = 4;

// Asks early for what lies `ahead` bytes behind B's rows: the rows that come next.
template <class Dot, int M>
void dot_block(const float* const* a, const float* const* b, int64_t length, int64_t ahead, float* c,
               int64_t c_stride) {
  Floats sum[M][DOT_COLUMNS] = {};
  for (int64_t k = 0; k < length; k += LANES) {
    Floats column[DOT_COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < DOT_COLUMNS; ++j) {
      column[j] = load(b[j] + k);
      __builtin_prefetch((const char*)(b[j] + k) + ahead);
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const Floats value = load(a[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < DOT_COLUMNS; ++j) sum[i][j] = Dot::multiply_add(sum[i][j], value, column[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) store_as(c + i * c_stride, sums_of_lanes(sum[i]));
}

// The dot_block that has exactly `rows` rows.
template <class Dot, int M = DOT_ROWS>
void dot_block_of(int64_t rows, const float* const* a, const float* const* b, int64_t length, int64_t ahead,
                  float* c, int64_t c_stride) {
  if (rows == M) {
    dot_block<Dot, M>(a, b, length, ahead, c, c_stride);
  } else if constexpr (M > 1) {
    dot_block_of<Dot, M - 1>(rows, a, b, length, ahead, c, c_stride);
  }
}

// C [rows, columns], written up to a multiple of DOT_COLUMNS with numbers that mean nothing; row_of(i) is A_i.
//
// The rows of A that are few go together, so that those of B, fresh from memory, come no faster than they are used up;
// many take turns, one block in the nearest cache at a time, and find B in the next cache from the second turn on.
template <class Dot, class RowOf>
void row_dots(int64_t rows, RowOf row_of, const float* const* b, int64_t columns, int64_t length, float* c,
              int64_t c_stride) {
  constexpr int64_t FEW = 2 * DOT_ROWS;
  const int64_t turn = rows <= FEW ? FEW : DOT_ROWS;
  for (int64_t first = 0; first < rows; first += turn) {
    const int64_t last = smaller(rows, first + turn);
    const float* block[FEW];
    for (int64_t row = first; row < last; ++row) block[row - first] = row_of(row);
    for (int64_t column = 0; column < columns; column += DOT_COLUMNS) {
      const float* others[DOT_COLUMNS];
      for (int64_t j = 0; j < DOT_COLUMNS; ++j) others[j] = b[smaller(column + j, columns - 1)];
      const int64_t ahead = (const char*)b[smaller(column + DOT_COLUMNS, columns - 1)] - (const char*)others[0];
      for (int64_t row = first; row < last; row += DOT_ROWS)
        dot_block_of<Dot>(smaller(DOT_ROWS, last - row), block + row - first, others, length, ahead,
                          c + row * c_stride + column, c_stride);
    }
  }
}

// ---- row_sums: a block of sums, BLOCK_ROWS rows by a panel of columns, in registers for all k ----

// The columns of B_k (Fp32), or of the pair B_2k, B_2k+1 side by side in each word (Bf16Pairs).
inline void load_columns(Fp32, const float* const* b, int64_t column, Floats* columns) {
  columns[0] = load(b[0] + column);
  columns[1] = load(b[0] + column + LANES);
}

#if defined(__AVX512BF16__)
inline void pair_columns(Floats low, Floats high, Floats* columns) {
  const Words first = Words{0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                            0x280008, 0x290009, 0x2A000A, 0x2B000B, 0x2C000C, 0x2D000D, 0x2E000E, 0x2F000F};
  columns[0] = (Floats)_mm512_permutex2var_epi16((__m512i)low, (__m512i)first, (__m512i)high);
  columns[1] = (Floats)_mm512_permutex2var_epi16((__m512i)low, (__m512i)(first + 0x100010), (__m512i)high);
}

inline void load_columns(Bf16Pairs, const float* const* b, int64_t column, Floats* columns) {
  pair_columns(load(b[0] + column / 2), load(b[1] + column / 2), columns);
}

// The last row of an odd number.
inline void load_last_columns(Bf16Pairs, const float* const* b, int64_t column, Floats* columns) {
  pair_columns(load(b[0] + column / 2), Floats{}, columns);
}
#endif

struct RowSums {
  int64_t rows;    // of A and C
  const float* a;  // words
  int64_t a_stride;
  const float* const* b;
  int64_t depth;  // rows of B
  bool accumulate;
};

template <class Dot, class Out, Layout layout, int M>
void sum_block(const RowSums& p, const float* a, int64_t column, float* const* c) {
  const int64_t a_stride = p.a_stride;
  Floats sum[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[i][v] = p.accumulate ? load(c[i] + column + v * LANES) : Floats{};
  // One pointer for three rows: see register_block.
  constexpr int TRIPLES = (M + 2) / 3;
  const float* triple[TRIPLES];
#pragma GCC unroll 4
  for (int i = 0; i < TRIPLES; ++i) triple[i] = a + 3 * i * a_stride;
  const auto step = [&](int64_t k, const Floats* columns) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Floats value = broadcast(layout == Layout::ROWS ? triple[i / 3][i % 3 * a_stride] : a[k * a_stride + i]);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[i][v] = Dot::multiply_add(sum[i][v], value, columns[v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < TRIPLES; ++i) ++triple[i];
  };
  const int64_t whole = p.depth / Dot::DEPTH;
  Floats columns[2];
  for (int64_t k = 0; k < whole; ++k) {
    load_columns(Dot{}, p.b + k * Dot::DEPTH, column, columns);
    step(k, columns);
  }
  if constexpr (Dot::DEPTH > 1) {
    if (p.depth % Dot::DEPTH) {
      load_last_columns(Dot{}, p.b + whole * Dot::DEPTH, column, columns);
      step(whole, columns);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) Out::put(c[i], column + v * LANES, sum[i][v]);
}

// The sum_block that has exactly `rows` rows.
template <class Dot, class Out, Layout layout, int M = BLOCK_ROWS>
void sum_block_of(int64_t rows, const RowSums& p, const float* a, int64_t column, float* const* c) {
  if (rows == M) {
    sum_block<Dot, Out, layout, M>(p, a, column, c);
  } else if constexpr (M > 1) {
    sum_block_of<Dot, Out, layout, M - 1>(rows, p, a, column, c);
  }
}

// Panels [first, last) of C's columns; row_of(i) is C_i, words of Out.
template <class Dot, class Out, Layout layout, class RowOf>
void row_sums(const RowSums& p, int64_t first, int64_t last, RowOf row_of) {
  for (int64_t column = first * PANEL; column < last * PANEL; column += PANEL) {
    for (int64_t row = 0; row < p.rows; row += BLOCK_ROWS) {
      const int64_t rows = smaller(BLOCK_ROWS, p.rows - row);
      const float* a = p.a + (layout == Layout::ROWS ? row * p.a_stride : row);
      float* c[BLOCK_ROWS];
      for (int64_t i = 0; i < rows; ++i) c[i] = row_of(row + i);
      sum_block_of<Dot, Out, layout>(rows, p, a, column, c);
    }
  }
}

}  // namespace
