// skip_adapter's forward for few rows, such as a step of generation: packing the weights would take longer than all else,
// so they are read where they lie. At d = 4096 and w = 256, 16 rows took a third of the time so, 64 rows two thirds.

#pragma once

#include "row_products.h"
#include "skip_adapter_steps.h"

namespace fast_prompt::cpu::FAST_PROMPT_ISA {
namespace {

constexpr int64_t FEW_ROWS = MOST_TILE_ROWS;
constexpr int64_t DOTS_GRAIN = 1 << 16;  // products that are worth waking a thread for

// Whether a weight's rows are words as they lie.
template <class Dot>
bool lies_in_words(const Rows& weight, int64_t width) {
  return weight.dtype == Dot::Storage::DTYPE && width % PANEL == 0;
}

template <class Dot>
bool has_few_rows(const Call& call) {
  const SkipAdapter& problem = call.problem;
  return call.rows() <= FEW_ROWS && !problem.gates && !problem.route && problem.norm != SkipNorm::LAYER_AFTER &&
         lies_in_words<Dot>(problem.down_weight, problem.width) &&
         lies_in_words<Dot>(problem.up_weight, problem.adapter_width);
}

// C [count, rows] = A W^T for A [count, width] and the rows of W from `first` on.
template <class Dot>
void multiply_by_rows(const Runtime& runtime, const Operand& a, int64_t count, const Rows& weight, int64_t first,
                      int64_t rows, int64_t width, float* c, int64_t c_stride) {
  constexpr int64_t MOST = 16 * DOT_COLUMNS;
  const auto row_of = [&](int64_t i) { return a.words + i * a.stride; };
  const int64_t jobs = (rows + DOT_COLUMNS - 1) / DOT_COLUMNS, products = DOT_COLUMNS * width * count;
  parallel_for(runtime, jobs, 1 + DOTS_GRAIN / products, [&](int64_t begin, int64_t end) {
    const int64_t last = smaller(rows, end * DOT_COLUMNS);
    for (int64_t row = begin * DOT_COLUMNS; row < last; row += MOST) {
      const float* some[MOST];
      const int64_t many = smaller(MOST, last - row);
      for (int64_t i = 0; i < many; ++i) some[i] = (const float*)at(weight, first + row + i);
      row_dots<Dot>(count, row_of, some, many, row_words<Dot>(width), c + row, c_stride);
    }
  });
}

template <class Dot>
void forward_few_rows(const Call& call, const Rows& output, char* hidden) {
  const SkipAdapter& problem = call.problem;
  const Runtime& runtime = call.runtime;
  const int64_t count = call.rows(), width = problem.width, adapter_width = problem.adapter_width;
  const Adapter* adapters = prepare_adapters<Dot>(call, {false, false, false, false});
  const int64_t floats = make_tile(call, count, false, nullptr).floats;
  const Tile tile = make_tile(call, count, false, allocate_floats(runtime, floats));
  Span x{problem.x, 0, 0};
  for (int64_t i = 0; i < problem.adapters; ++i) {
    const Adapter& adapter = adapters[i];
    const Span y = i + 1 < problem.adapters ? tile.span(tile.between) : Span{output, 0, count};
    const Operand z = norm_rows<Dot>(call, adapter, x, count, tile);
    multiply_by_rows<Dot>(runtime, z, count, problem.down_weight, i * adapter_width, adapter_width, width, tile.hidden,
                          tile.tall);
    finish_hidden(call, adapter, i * count, count, hidden, tile);
    activate_rows(call, i * count, count, tile, nullptr);
    const Operand t{hidden_as_words<Dot>(call, tile.hidden, count, 1, tile, tile.weighted), tile.tall};
    multiply_by_rows<Dot>(runtime, t, count, problem.up_weight, i * width, width, adapter_width, tile.results,
                          tile.wide);
    write_results(call, adapter, x, y, count, tile, [&](const auto& action) {
      for (int64_t c = 0; c < width; c += LANES)
        action(UpColumns{0, count, c, width, tile.results + c, tile.wide, load(adapter.up_bias + c), adapter.scale});
    });
    x = y;
  }
  finish_streams();
}

}  // namespace
}  // namespace fast_prompt::cpu::FAST_PROMPT_ISA
