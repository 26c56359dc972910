// C (+)= A B for a block of rows: the one inner loop of every op, and the packing that feeds it.
//
// Operands are arrays of 32-bit "words": a word is one float (Fp32) or two neighbouring bf16 (Bf16Pairs), and
// the depth of a product counts words. B is packed in panels of PANEL columns, [depth][columns], so that the
// inner loop reads it in order; A is read in place, one broadcast word per row and step. An M x 2 register
// block of sums stays in registers for the whole depth: 12 rows on AVX-512 (24 of 32 registers), 6 elsewhere
// (12 of 16), which leaves each multiply-add its own broadcast or a third of a load.

#pragma once

#include "vector.h"

namespace {

constexpr int PANEL = 2 * LANES;                     // columns of a packed panel; the last may be LANES wide
constexpr int BLOCK_ROWS = LANES == 16 ? 12 : 6;     // rows of a register block

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Columns the panels of a packed B really hold: n rounded up to a whole register.
inline int64_t packed_columns(int64_t n) { return round_up(n, LANES); }

// A row stride, in words, that lies an odd number of cache lines apart: rows then spread over all cache sets.
inline int64_t spread_stride(int64_t columns) { return ((columns + 15) / 16 | 1) * 16; }

// How products are formed: DEPTH elements per word, stored as Storage; rounded(x) is x as a word holds it; put() writes
// a register of elements at an element's place in an array of words.
struct Fp32 {
  typedef Float32 Storage;
  static constexpr int DEPTH = 1;
  static Floats rounded(Floats value) { return value; }
  static void put(float* words, int64_t element, Floats value) { store(words + element, value); }
  static Floats multiply_add(Floats sum, Floats a, Floats b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
  typedef BFloat16 Storage;
  static constexpr int DEPTH = 2;
  static Floats rounded(Floats value) {
    return (Floats)(__builtin_convertvector(BFloat16::as_stored(value), Words) << 16);
  }
  static void put(float* words, int64_t element, Floats value) {
    store_as((uint16_t*)words + element, BFloat16::as_stored(value));
  }
  static Floats multiply_add(Floats sum, Floats a, Floats b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class Dot>
inline int64_t words(int64_t elements) { return (elements + Dot::DEPTH - 1) / Dot::DEPTH; }

// Where A(i, k) lies: a[i * row + k] (Row-major), or a[k * row + i] (the transpose of a row-major matrix).
enum class Layout { ROWS, COLUMNS };

// Memory that is wanted after a product, asked for while it runs: two equally long runs of cache lines, or none.
struct Ahead {
  const char* streams[2];
  int64_t lines;
};

struct Product {
  int64_t rows, columns, depth;  // columns of C, a multiple of LANES; depth in words
  const float* a;
  int64_t a_stride;
  const float* b;  // packed panels
  float* c;
  int64_t c_stride;
  bool accumulate;
  Ahead ahead;
};

template <class Dot, Layout layout, int M, int V>
void register_block(const Product& p, const float* a, const float* b, float* c, const Ahead& ahead) {
  const int64_t a_stride = p.a_stride, c_stride = p.c_stride, depth = p.depth;
  Floats sum[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[i][v] = p.accumulate ? load(c + i * c_stride + v * LANES) : Floats{};
  // One pointer for three rows: x86 can add 0, 1 or 2 row strides in the address, and 12 pointers would spill.
  constexpr int TRIPLES = (M + 2) / 3;
  const float* triple[TRIPLES];
#pragma GCC unroll 4
  for (int i = 0; i < TRIPLES; ++i) triple[i] = a + 3 * i * a_stride;
  for (int64_t k = 0; k < depth; ++k) {
    if (layout == Layout::ROWS && k < ahead.lines) {
      __builtin_prefetch(ahead.streams[0] + k * 64, 0, 2);
      __builtin_prefetch(ahead.streams[1] + k * 64, 0, 2);
    }
    Floats column[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) column[v] = load(b + (k * V + v) * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Floats value = broadcast(layout == Layout::ROWS ? triple[i / 3][i % 3 * a_stride] : a[k * a_stride + i]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = Dot::multiply_add(sum[i][v], value, column[v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < TRIPLES; ++i) ++triple[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(c + i * c_stride + v * LANES, sum[i][v]);
}

// The register block that has exactly `rows` rows.
template <class Dot, Layout layout, int V, int M = BLOCK_ROWS>
void block_of(int64_t rows, const Product& p, const float* a, const float* b, float* c, const Ahead& ahead) {
  if (rows == M) {
    register_block<Dot, layout, M, V>(p, a, b, c, ahead);
  } else if constexpr (M > 1) {
    block_of<Dot, layout, V, M - 1>(rows, p, a, b, c, ahead);
  }
}

template <class Dot, Layout layout>
void multiply_panel(const Product& p, int64_t column, const float* panel) {
  const bool full = p.columns - column >= PANEL;
  const int64_t blocks = (p.rows + BLOCK_ROWS - 1) / BLOCK_ROWS, panels = (p.columns + PANEL - 1) / PANEL;
  // Every register block asks for its share of what lies ahead.
  const int64_t share = (p.ahead.lines + blocks * panels - 1) / (blocks * panels);
  for (int64_t row = 0; row < p.rows; row += BLOCK_ROWS) {
    const float* a = p.a + (layout == Layout::ROWS ? row * p.a_stride : row);
    float* c = p.c + row * p.c_stride + column;
    const int64_t rows = smaller(BLOCK_ROWS, p.rows - row);
    const int64_t start = (column / PANEL * blocks + row / BLOCK_ROWS) * share;
    const Ahead ahead{{p.ahead.streams[0] + start * 64, p.ahead.streams[1] + start * 64}, share};
    full ? block_of<Dot, layout, 2>(rows, p, a, panel, c, ahead)
         : block_of<Dot, layout, 1>(rows, p, a, panel, c, ahead);
  }
}

template <class Dot, Layout layout>
void multiply(const Product& p) {
  for (int64_t column = 0; column < p.columns; column += PANEL)
    multiply_panel<Dot, layout>(p, column, p.b + column * p.depth);
}

// A B a register block at a time, with no C: finish(row, rows, column, columns, sums) gets each block's sums
// [rows, PANEL] at its place in C while they are in the nearest cache.
template <class Dot, class Finish>
void multiply_blocks(const Product& p, const Finish& finish) {
  alignas(64) float sums[BLOCK_ROWS * PANEL];
  for (int64_t column = 0; column < p.columns; column += PANEL) {
    const int64_t columns = smaller(PANEL, p.columns - column);
    for (int64_t row = 0; row < p.rows; row += BLOCK_ROWS) {
      const int64_t rows = smaller(BLOCK_ROWS, p.rows - row);
      const float* a = p.a + row * p.a_stride;
      multiply_panel<Dot, Layout::ROWS>({rows, columns, p.depth, a, p.a_stride, nullptr, sums, PANEL, false, {}}, 0,
                                        p.b + column * p.depth);
      finish(row, rows, column, columns, sums);
    }
  }
}

// ---- Rows in, words out ----

enum class Part { WHOLE, RESIDUAL };  // a number as a word holds it, or what that loses

// `count` elements as words; the last register is filled up with zeros.
template <class Dot, Part part = Part::WHOLE>
void stage(Dtype dtype, const void* source, int64_t count, float* target) {
  with_storage(dtype, [=](auto storage) {
    for_each_vector<decltype(storage)>(count, [=](int64_t c, auto load, auto) {
      const Floats value = load(source);
      Dot::put(target, c, part == Part::WHOLE ? value : value - Dot::rounded(value));
    });
  });
}

constexpr int64_t SLICE = 64;  // elements of a row staged on the stack at a time

// One panel of B = W^T: rows first, first + 1, ... of W [n, width] become columns; rows past the last are zero.
// Four columns at a time, as one 16-byte store a step: single words would take four times as long.
template <class Dot, Part part = Part::WHOLE>
void pack_transposed(const Rows& w, int64_t first, int64_t n, int64_t width, float* panel) {
  typedef float Four __attribute__((vector_size(16)));
  const int64_t columns = smaller(PANEL, packed_columns(n) - first);
  alignas(64) float buffer[4][SLICE];
  const float* slice[4];
  for (int64_t start = 0; start < width; start += SLICE) {
    const int64_t elements = smaller(SLICE, width - start);
    float* target = panel + start / Dot::DEPTH * columns;
    for (int64_t column = 0; column < columns; column += 4) {
      for (int64_t i = 0, row = first + column; i < 4; ++i, ++row) {
        slice[i] = buffer[i];
        if (row >= n) {
          memset(buffer[i], 0, sizeof buffer[i]);
        } else if (Dot::DEPTH == 1 && w.dtype == Dtype::FLOAT32) {
          slice[i] = (const float*)at(w, row, start);  // they are words already
        } else {
          stage<Dot, part>(w.dtype, at(w, row, start), elements, buffer[i]);
        }
      }
      for (int64_t k = 0; k < words<Dot>(elements); ++k)
        store_as(target + k * columns + column, Four{slice[0][k], slice[1][k], slice[2][k], slice[3][k]});
    }
  }
}

// Columns [column, column + columns) of W [n, width], one after the other along the depth: a panel of B = W, or
// all of A = W^T laid out by columns. The elements of one word come from DEPTH neighbouring rows.
template <class Dot>
void pack(const Rows& w, int64_t n, int64_t column, int64_t columns, int64_t width, float* target) {
  const int64_t valid = smaller(columns, width - column);
  for (int64_t row = 0; row < n; row += Dot::DEPTH, target += columns) {
    if constexpr (Dot::DEPTH == 1) {
      stage<Dot>(w.dtype, at(w, row, column), valid, target);
    } else {
      for (int64_t start = 0; start < valid; start += SLICE) {
        alignas(64) uint16_t low[SLICE], high[SLICE] = {};
        const int64_t elements = smaller(SLICE, valid - start);
        stage<Dot>(w.dtype, at(w, row, column + start), elements, (float*)low);
        if (row + 1 < n) stage<Dot>(w.dtype, at(w, row + 1, column + start), elements, (float*)high);
        for (int64_t c = 0; c < round_up(elements, LANES); c += LANES) {
          const Words pairs = widened(load_as<Halves>(low + c)) | widened(load_as<Halves>(high + c)) << 16;
          store_as(target + start + c, pairs);
        }
      }
    }
  }
}

}  // namespace
