// Rows a tile at a time: which rows a thread takes, a tile as an operand of products, its results on their way out.

#pragma once

#include "gemm.h"

namespace {

constexpr int64_t PACK_GRAIN = 1 << 15;  // elements packed that are worth a thread

// ---- Rows of a thread ----

struct Run {
  int64_t count, rows;  // runs, and rows in each but the last
};

// Runs for the threads at hand, each of `least` rows or more.
inline Run split_rows(const Runtime& runtime, int64_t rows, int64_t least) {
  const int64_t count = smaller(runtime.threads, (rows + least - 1) / least);
  const int64_t length = round_up((rows + count - 1) / count, BLOCK_ROWS);
  return {(rows + length - 1) / length, length};
}

// ---- Rows in ----

template <class Dot>
void stage_rows(const Rows& from, int64_t first, int64_t count, int64_t width, float* target, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) stage<Dot>(from.dtype, at(from, first + i), width, target + i * stride);
}

// Rows as the left operand of a product.
struct Operand {
  const float* words;
  int64_t stride;
};

// Rows as they lie, where they are words already and equally far apart; else staged in `scratch`.
template <class Dot>
Operand as_operand(const Rows& rows, int64_t first, int64_t count, int64_t width, float* scratch, int64_t stride) {
  const bool one_stride = first / rows.rows_per_batch == (first + count - 1) / rows.rows_per_batch ||
                          rows.batch_stride == rows.rows_per_batch * rows.row_stride;
  const bool whole_words = width % Dot::DEPTH == 0 && rows.row_stride % Dot::DEPTH == 0;
  const char* start = at(rows, first);
  if (rows.dtype == Dot::Storage::DTYPE && one_stride && whole_words && (uintptr_t)start % sizeof(float) == 0)
    return {(const float*)start, rows.row_stride / Dot::DEPTH};
  stage_rows<Dot>(rows, first, count, width, scratch, stride);
  return {scratch, stride};
}

// `count` rows to ask for early, to be read or written: those of `a` from a_first on and of `b` from b_first on. None
// where rows do not lie one after another; an absent one, like a lone one, stands twice.
inline Ahead rows_ahead(Rows a, int64_t a_first, Rows b, int64_t b_first, int64_t count, int64_t width) {
  if (!a.data) a = b, a_first = b_first;
  if (!b.data) b = a, b_first = a_first;
  const auto dense = [width](const Rows& rows) {
    return rows.row_stride == width && rows.batch_stride == width * rows.rows_per_batch;
  };
  if (count <= 0 || !a.data || !dense(a) || !dense(b)) return {};
  return {{at(a, a_first), at(b, b_first)}, count * width * bytes_of(a.dtype) / 64};
}

// sums (+)= A^T B for rows of words, A [count, p] and B [count, width]. `transposed` is room for A by columns, `panel`
// for a panel of B.
template <class Dot>
void add_outer_products(const Operand& a, int64_t p, const Operand& b, int64_t width, int64_t count, bool accumulate,
                        float* sums, int64_t stride, float* transposed, float* panel) {
  const Rows multiplied{(char*)b.words, Dot::Storage::DTYPE, count, 0, b.stride * Dot::DEPTH};
  const int64_t padded = packed_columns(width);
  Product product{p, padded, words<Dot>(count), a.words, a.stride, nullptr, sums, stride, accumulate, {}};
  if constexpr (Dot::DEPTH > 1) {
    const Rows operand{(char*)a.words, Dot::Storage::DTYPE, count, 0, a.stride * Dot::DEPTH};
    product.a_stride = packed_columns(p);
    pack<Dot>(operand, count, 0, product.a_stride, p, transposed);
    product.a = transposed;
  }
  for (int64_t column = 0; column < padded; column += PANEL) {
    pack<Dot>(multiplied, count, column, smaller(PANEL, padded - column), width, panel);
    multiply_panel<Dot, Layout::COLUMNS>(product, column, panel);
  }
}

// ---- Rows out ----

// A result larger than this many bytes goes past the cache: it would not stay there, and a plain store first reads the
// line it overwrites. At few prompts a forward with a result of 5.8 MB took a fifth less time so.
constexpr int64_t STREAMED_BYTES = 1 << 21;

constexpr int64_t MOST_TILE_ROWS = 8 * BLOCK_ROWS;

// A tile's rows of a result, each element of which is written once.
template <class Storage>
struct Result {
  char* row[MOST_TILE_ROWS];
  int64_t width;
  bool stream;

  Result(const Rows& rows, int64_t all_rows, int64_t width, int64_t first, int64_t count) : width(width) {
    const int64_t element = sizeof(typename Storage::Element);
    stream = all_rows * width * element > STREAMED_BYTES;
    for (int64_t i = 0; i < count; ++i) {
      row[i] = at(rows, first + i);
      stream = stream && (uintptr_t)row[i] % (LANES * element) == 0;
    }
  }
  void operator()(int64_t i, int64_t column, Floats value) const {
    put<Storage>(row[i], column, value, width, stream);
  }
};

}  // namespace
