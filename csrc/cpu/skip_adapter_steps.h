// The steps that skip_adapter's forward and backward have in common: see skip_adapter.cpp.

#pragma once

#include "gemm.h"
#include "parallel.h"
#include "philox.h"
#include "../skip_adapter.h"
#include "skip_adapter_rows.h"
#include "tiles.h"
#include "vector.h"

namespace fast_prompt::cpu::FAST_PROMPT_ISA {
namespace {

// ---- Adapters, ready to multiply ----

// B = W or, transposed, W^T of a weight W [rows, columns], in packed panels.
struct Packing {
  Rows weight;
  int64_t rows, columns;
  bool transposed;
  float* target;

  int64_t width() const { return transposed ? rows : columns; }
  int64_t depth() const { return transposed ? columns : rows; }
  int64_t panels() const { return (width() + PANEL - 1) / PANEL; }
};

template <class Dot>
int64_t packed_floats(const Packing& packing) {
  return words<Dot>(packing.depth()) * packed_columns(packing.width());
}

template <class Dot>
void pack_panel(const Packing& p, int64_t panel) {
  const int64_t column = panel * PANEL;
  float* target = p.target + column * words<Dot>(p.depth());
  if (p.transposed) {
    pack_transposed<Dot>(p.weight, column, p.rows, p.columns, target);
  } else {
    pack<Dot>(p.weight, p.rows, column, smaller(PANEL, packed_columns(p.columns) - column), p.columns, target);
  }
}

// Which forms of the weights a pass multiplies by.
struct Forms {
  bool down, up, up_gradient, down_gradient;
};

// The packed groups of an up projection follow on one another, equally long.
struct Adapter {
  const float *down, *up;                    // W_d^T and W_u^T
  const float *up_gradient, *down_gradient;  // W_u and W_d, for the gradients of t and z
  const float *down_bias, *up_bias, *norm_weight, *norm_bias;  // floats, filled up to a panel; zeros where absent
  float scale;
};

// Row `index` of a parameter's matrix as a matrix of its own, and those that follow.
Rows from_row(const Rows& rows, int64_t index, int64_t count) {
  return {at(rows, index), rows.dtype, count, 0, rows.row_stride};
}

// What the steps of a call share.
struct Call {
  const SkipAdapter& problem;
  const Runtime& runtime;
  bool normed_before, rms;
  int64_t group_width, group_hidden;  // columns of a group of the output, and of the hidden layer
  // Samples, and the rows of each, that are not left alone; a single one of all rows where they need not be told apart.
  const int64_t* samples;
  int64_t num_samples, sample_rows;

  int64_t rows() const { return num_samples * sample_rows; }
  int64_t all_rows() const { return problem.batch * problem.tokens; }
  bool alone() const { return problem.route || problem.adapters == 1; }  // one adapter for each row
};

Call make_call(const SkipAdapter& problem, const Runtime& runtime) {
  const bool normed_before = problem.norm == SkipNorm::LAYER || problem.norm == SkipNorm::RMS;
  Call call{problem, runtime, normed_before, problem.norm == SkipNorm::RMS, problem.width / problem.groups,
            problem.adapter_width / problem.groups, nullptr, 0, problem.tokens};
  int64_t* samples = allocate<int64_t>(runtime, problem.batch);
  call.samples = samples;
  if (problem.route || problem.gates) {
    for (int64_t sample = 0; sample < problem.batch; ++sample)
      if (!problem.route || problem.route[sample] >= 0) samples[call.num_samples++] = sample;
  } else {
    samples[call.num_samples++] = 0;
    call.sample_rows = call.all_rows();
  }
  return call;
}

// The packings of an up projection: group after group.
template <class Dot>
void list_groups(const Call& call, const Rows& weight, bool transposed, float* target, Packing* list) {
  for (int64_t group = 0; group < call.problem.groups; ++group) {
    list[group] = {from_row(weight, group * call.group_width, call.group_width), call.group_width, call.group_hidden,
                   transposed, target};
    target += packed_floats<Dot>(list[group]);
  }
}

template <class Dot>
int64_t up_floats(const Call& call, bool transposed) {
  return call.problem.groups *
         packed_floats<Dot>({{}, call.group_width, call.group_hidden, transposed, nullptr});
}

template <class Dot>
void pack_all(const Runtime& runtime, const Packing* list, int64_t count, int64_t elements) {
  int64_t panels = 0;
  for (int64_t i = 0; i < count; ++i) panels += list[i].panels();
  if (panels == 0) return;
  parallel_for(runtime, panels, 1 + PACK_GRAIN * panels / elements, [=](int64_t begin, int64_t end) {
    const Packing* packing = list;
    int64_t first = 0;
    for (int64_t panel = begin; panel < end; ++panel) {
      for (; panel - first >= packing->panels(); ++packing) first += packing->panels();
      pack_panel<Dot>(*packing, panel - first);
    }
  });
}

// `count` rows as floats, each filled up to a panel with zeros; zeros alone for an absent parameter.
const float* stage_parameter(const Runtime& runtime, const Rows& rows, int64_t count, int64_t width) {
  const int64_t padded = round_up(width, LANES) + LANES;
  float* floats = allocate_floats(runtime, count * padded);
  memset(floats, 0, count * padded * sizeof(float));
  for (int64_t i = 0; rows.data && i < count; ++i) stage<Fp32>(rows.dtype, at(rows, i), width, floats + i * padded);
  return floats;
}

// Every adapter of a call. Of a mixture only what all samples share: see mix().
template <class Dot>
const Adapter* prepare_adapters(const Call& call, const Forms& forms) {
  const SkipAdapter& problem = call.problem;
  const int64_t count = problem.adapters, width = problem.width, hidden = problem.adapter_width;
  const auto stage_all = [&](const Rows& rows, int64_t columns) {
    return stage_parameter(call.runtime, rows, count, columns);
  };
  const float *down_bias = stage_all(problem.down_bias, hidden), *up_bias = stage_all(problem.up_bias, width);
  const float *norm_weight = stage_all(problem.norm_weight, width), *norm_bias = stage_all(problem.norm_bias, width);
  Adapter* adapters = allocate<Adapter>(call.runtime, count);
  Packing* list = allocate<Packing>(call.runtime, 4 * count);
  int64_t packings = 0;
  const auto packed = [&](bool wanted, const Rows& weight, int64_t index, int64_t rows, int64_t columns,
                          bool transposed) -> const float* {
    if (!wanted) return nullptr;
    Packing& packing = list[packings++];
    packing = {from_row(weight, index * rows, rows), rows, columns, transposed, nullptr};
    return packing.target = allocate_floats(call.runtime, packed_floats<Dot>(packing));
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t wide = i * (round_up(width, LANES) + LANES), tall = i * (round_up(hidden, LANES) + LANES);
    adapters[i] = {packed(forms.down, problem.down_weight, i, hidden, width, true),
                   packed(forms.up && !problem.gates, problem.up_weight, i, width, hidden, true),
                   packed(forms.up_gradient && !problem.gates, problem.up_weight, i, width, hidden, false),
                   packed(forms.down_gradient, problem.down_weight, i, hidden, width, false),
                   down_bias + tall,
                   up_bias + wide,
                   norm_weight + wide,
                   norm_bias + wide,
                   problem.scale ? problem.scale[i] : 1.0f};
  }
  pack_all<Dot>(call.runtime, list, packings, packings * width * hidden);
  return adapters;
}

// ---- A mixture: each sample has an up projection of its own ----

struct Mixture {
  float *weight, *bias, *up, *up_gradient;  // sum of gate times expert; the weight [width, group_hidden] packed
};

template <class Dot>
Mixture allocate_mixture(const Call& call, const Forms& forms) {
  if (!call.problem.gates) return {};
  return {allocate_floats(call.runtime, call.problem.width * call.group_hidden),
          allocate_floats(call.runtime, round_up(call.problem.width, LANES) + LANES),
          forms.up ? allocate_floats(call.runtime, up_floats<Dot>(call, true)) : nullptr,
          forms.up_gradient ? allocate_floats(call.runtime, up_floats<Dot>(call, false)) : nullptr};
}

// sum over e of gates[e] times the row's e-th part of `width` elements.
void mix_row(const Rows& rows, int64_t index, int64_t step, int64_t part, const float* gates, int64_t experts,
             int64_t width, float* result) {
  with_storage(rows.dtype, [=](auto storage) {
    for_each_vector<decltype(storage)>(width, [=](int64_t c, auto load_row, auto) {
      Floats sum = {};
      for (int64_t e = 0; e < experts; ++e)
        sum += load_row(at(rows, index + e * step, e * part)) * gates[e];
      if (width - c < LANES) {
        store_some<Float32>(result + c, sum, width - c);
      } else {
        store(result + c, sum);
      }
    });
  });
}

// The adapter of a mixture's sample.
template <class Dot>
Adapter mix(const Call& call, Adapter adapter, int64_t sample, const Mixture& own) {
  const SkipAdapter& problem = call.problem;
  const float* gates = problem.gates + sample * problem.experts;
  const int64_t width = problem.width, hidden = call.group_hidden;
  for (int64_t row = 0; row < width; ++row)
    mix_row(problem.up_weight, row, 0, hidden, gates, problem.experts, hidden, own.weight + row * hidden);
  memset(own.bias, 0, (round_up(width, LANES) + LANES) * sizeof(float));
  if (problem.up_bias.data) mix_row(problem.up_bias, 0, 1, 0, gates, problem.experts, width, own.bias);
  adapter.up_bias = own.bias;
  const Rows weight{(char*)own.weight, Dtype::FLOAT32, width, 0, hidden};
  const auto pack_groups = [&](bool transposed, float* target) {
    for (int64_t group = 0; target && group < problem.groups; ++group) {
      const Packing packing{from_row(weight, group * call.group_width, call.group_width), call.group_width, hidden,
                            transposed, target};
      for (int64_t panel = 0; panel < packing.panels(); ++panel) pack_panel<Dot>(packing, panel);
      target += packed_floats<Dot>(packing);
    }
  };
  pack_groups(true, own.up);
  pack_groups(false, own.up_gradient);
  adapter.up = own.up;
  adapter.up_gradient = own.up_gradient;
  return adapter;
}

// ---- Tiles ----

// Rows of a matrix from `first` on.
struct Span {
  Rows rows;
  int64_t first;
  int64_t all;  // rows of the whole matrix: a large result goes past the cache; 0 for scratch
  char* row(int64_t i) const { return at(rows, first + i); }
};

// Rows [first, first + count) of all; `sample` is theirs where samples are told apart.
struct Block {
  int64_t first, count, sample;
};

// Scratch of one tile, carved from one allocation. Strides are in floats, or in words.
struct Tile {
  int64_t wide, tall;  // strides of [rows, width] and [rows, adapter_width] buffers
  float *normed, *hidden, *weighted, *results;  // z; h, then t; t as words; v
  float *between, *kept, *row;                   // rows between the adapters of a run; dropout's factors; a row as floats
  Moments* moments;                              // of the rows that norm_rows() normed last
  float *slopes, *gradients, *gradient_words, *grad, *normed_grad, *passed, *transposed, *panel;  // of a backward
  int64_t floats;

  Span span(float* buffer) const { return {{(char*)buffer, Dtype::FLOAT32, MOST_TILE_ROWS, 0, wide}, 0, 0}; }
};

// Elements from one group to the next, in rows of words that are multiplied group by group.
template <class Dot>
int64_t group_step(const Call& call, int64_t elements) {
  return Dot::DEPTH == 1 || call.problem.groups == 1 ? elements : round_up(elements, PANEL);
}

Tile make_tile(const Call& call, int64_t rows, bool backward, float* memory) {
  const SkipAdapter& problem = call.problem;
  Tile tile{};
  // Room for the last group of words to be filled up, and for a result to be written a register at a time.
  tile.wide = spread_stride(problem.groups * round_up(call.group_width, LANES) + LANES);
  tile.tall = spread_stride(problem.groups * round_up(call.group_hidden, LANES) + LANES);
  float* const start = memory;
  const auto take = [&memory](int64_t floats) {
    float* taken = memory;
    memory += round_up(floats, 16);
    return taken;
  };
  const int64_t wide = rows * tile.wide, tall = rows * tile.tall;
  tile.normed = take(wide);
  tile.hidden = take(tall);
  tile.weighted = take(tall);
  tile.results = take(wide);
  tile.kept = take(tile.tall);
  tile.row = take(tile.wide);
  tile.moments = (Moments*)take(rows * sizeof(Moments) / sizeof(float));
  tile.between = take(problem.adapters > 1 ? (backward ? problem.adapters - 1 : 1) * wide : 0);
  if (backward) {
    tile.slopes = take(tall);
    tile.gradients = take(tall);
    tile.gradient_words = take(tall);
    tile.grad = take(wide);
    tile.normed_grad = take(wide);
    tile.passed = take(problem.adapters > 1 ? wide : 0);
    tile.transposed = take(tall);
    tile.panel = take(rows * PANEL);
  }
  tile.floats = memory - start;
  for (int64_t c = 0; start && c < tile.tall; c += LANES) store(tile.kept + c, broadcast(1.0f));
  return tile;
}

// Rows of a full tile: as many as keep a tile's largest matrix within a good part of the second cache.
int64_t tile_rows(const Call& call) {
  const int64_t rows = (1 << 16) / call.problem.width / BLOCK_ROWS * BLOCK_ROWS;
  return smaller(MOST_TILE_ROWS, rows > 2 * BLOCK_ROWS ? rows : 2 * BLOCK_ROWS);
}

// Rows whose arithmetic is worth waking a thread for.
int64_t rows_worth_a_thread(const Call& call) {
  return 1 + (1 << 18) / (call.problem.width * (call.problem.adapter_width + 8));
}

// Calls body(block) for the rows [begin, end) of those that are not left alone, a tile at a time.
template <class Body>
void for_each_block(const Call& call, int64_t begin, int64_t end, const Body& body) {
  const int64_t most = tile_rows(call);
  for (int64_t row = begin; row < end;) {
    const int64_t index = row / call.sample_rows, offset = row % call.sample_rows;
    const int64_t left = smaller(call.sample_rows - offset, end - row), tiles = (left + most - 1) / most;
    const int64_t count = smaller(left, round_up((left + tiles - 1) / tiles, BLOCK_ROWS));
    body(Block{call.samples[index] * call.sample_rows + offset, count, call.samples[index]});
    row += count;
  }
}

// ---- One adapter's steps on a tile ----

constexpr int64_t SLICE_DEPTH = 128;  // words: so much of a panel stays in the nearest cache for all rows of a tile

// multiply(), a slice of the depth at a time.
template <class Dot>
void multiply_in_slices(const Product& p) {
  for (int64_t column = 0; column < p.columns; column += PANEL) {
    const int64_t columns = smaller(PANEL, p.columns - column);
    Product slice = p;
    for (int64_t start = 0; start < p.depth; start += SLICE_DEPTH) {
      slice.depth = smaller(SLICE_DEPTH, p.depth - start);
      slice.a = p.a + start;
      multiply_panel<Dot, Layout::ROWS>(slice, column, p.b + column * p.depth + start * columns);
      slice.accumulate = true;
      slice.ahead = {};
    }
  }
}

// Rows of `groups` groups of elements as words, group after group.
template <class Dot>
void stage_groups(const Call& call, const Span& rows, int64_t count, int64_t groups, int64_t elements, float* target,
                  int64_t stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t group = 0; group < groups; ++group)
      stage<Dot>(rows.rows.dtype, rows.row(i) + group * elements * bytes_of(rows.rows.dtype), elements,
                 target + i * stride + group * group_step<Dot>(call, elements) / Dot::DEPTH);
}

// A buffer of hidden rows as words: as it is, or copied to `target`.
template <class Dot>
const float* hidden_as_words(const Call& call, float* rows, int64_t count, int64_t groups, const Tile& tile,
                             float* target) {
  if (Dot::DEPTH == 1) return rows;
  const Span span{{(char*)rows, Dtype::FLOAT32, MOST_TILE_ROWS, 0, tile.tall}, 0, 0};
  stage_groups<Dot>(call, span, count, groups, call.problem.adapter_width / groups, target, tile.tall);
  return target;
}

// z as words.
template <class Dot>
Operand norm_rows(const Call& call, const Adapter& adapter, const Span& x, int64_t count, const Tile& tile) {
  const int64_t width = call.problem.width;
  if (!call.normed_before) return as_operand<Dot>(x.rows, x.first, count, width, tile.normed, tile.wide);
  with_storage(x.rows.dtype, [&](auto storage) {
    typedef decltype(storage) In;
    for (int64_t first = 0; first < count; first += NORM_ROWS) {
      const char* row[NORM_ROWS];
      float* target[NORM_ROWS];
      for (int64_t i = 0; i < NORM_ROWS; ++i) {
        const int64_t index = smaller(first + i, count - 1);  // the last row stands in for those there are not
        row[i] = x.row(index), target[i] = tile.normed + index * tile.wide;
      }
      Moments of[NORM_ROWS];
      moments_of_rows<In>(row, width, call.rms, call.problem.eps, of);
      for (int64_t i = 0; i < smaller(NORM_ROWS, count - first); ++i) tile.moments[first + i] = of[i];
      for_each_vector<In>(width, [&](int64_t c, auto load_row, auto) __attribute__((always_inline)) {
        const Floats weight = load(adapter.norm_weight + c), bias = load(adapter.norm_bias + c);
#pragma GCC unroll 4
        for (int i = 0; i < NORM_ROWS; ++i)
          Dot::put(target[i], c, normed(load_row(row[i]), of[i], weight, bias));
      });
    }
  });
  return {tile.normed, tile.wide};
}

// tile.kept for a hidden row: 0 or 1 / (1 - dropout_p). Without dropout the ones written at first stay.
void draw_dropout(const SkipAdapter& problem, int64_t hidden_row, float* kept) {
  const uint64_t first = (uint64_t)hidden_row * problem.adapter_width;
  dropout_factors(problem.dropout, first, problem.adapter_width, kept);
}

// h of the rows of W_d z in tile.hidden, in their place; kept where `hidden` wants them.
inline void finish_hidden(const Call& call, const Adapter& adapter, int64_t hidden_row, int64_t count, char* hidden,
                          const Tile& tile) {
  const int64_t width = call.problem.adapter_width;
  for (int64_t i = 0; i < count; ++i) {
    float* h = tile.hidden + i * tile.tall;
    for (int64_t c = 0; c < width; c += LANES) store(h + c, load(h + c) + load(adapter.down_bias + c));
    if (hidden)
      with_storage(call.problem.hidden_dtype, [&](auto storage) {
        typedef decltype(storage) Storage;
        write_row<Storage>(h, width, hidden + (hidden_row + i) * width * sizeof(typename Storage::Element));
      });
  }
}

// t of the rows of h in tile.hidden, in their place; their slopes into `slopes` unless it is null.
void activate_rows(const Call& call, int64_t hidden_row, int64_t count, const Tile& tile, float* slopes) {
  with_activation(call.problem.activation, [&](auto activation) {
    for (int64_t i = 0; i < count; ++i) {
      float *h = tile.hidden + i * tile.tall, *slope = slopes ? slopes + i * tile.tall : nullptr;
      draw_dropout(call.problem, hidden_row + i, tile.kept);
      for (int64_t c = 0; c < call.problem.adapter_width; c += LANES) {
        const Activated of = decltype(activation)::at(load(h + c));
        const Floats kept = load(tile.kept + c);
        store(h + c, of.value * kept);
        if (slope) store(slope + c, of.slope * kept);
      }
    }
  });
}

// A register's columns of v = s (W_u t + b_u), for some rows.
struct UpColumns {
  int64_t row, rows, column, end;  // `end` of the columns' group
  const float* sums;               // W_u t
  int64_t stride;
  Floats bias;
  float scale;
  Floats operator[](int64_t i) const { return (load(sums + i * stride) + bias) * scale; }
};

// v in tile.results.
inline void keep_results(const UpColumns& v, const Tile& tile) {
  for (int64_t i = 0; i < v.rows; ++i) store(tile.results + (v.row + i) * tile.wide + v.column, v[i]);
}

// v, a register's columns at a time, to action(columns).
template <class Dot, class Action>
void project_up(const Call& call, const Adapter& adapter, const float* weighted, int64_t count, const Tile& tile,
                const Action& action) {
  const int64_t width = call.group_width, depth = words<Dot>(call.group_hidden);
  for (int64_t group = 0; group < call.problem.groups; ++group) {
    const int64_t first = group * width, last = first + width;
    const float* t = weighted + group * group_step<Dot>(call, call.group_hidden) / Dot::DEPTH;
    const float* up = adapter.up + group * packed_columns(width) * depth;
    const Product product{count, packed_columns(width), depth, t, tile.tall, up, nullptr, 0, false, {}};
    multiply_blocks<Dot>(product, [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums) {
      for (int64_t c = 0; c < columns; c += LANES) {
        const int64_t place = first + column + c;
        action(UpColumns{row, rows, place, last, sums + c, PANEL, load(adapter.up_bias + place), adapter.scale});
      }
    });
  }
}

// Rows of results, each element of which is written once.
template <class Storage>
struct Output {
  Result<Storage> result;
  Output(const Call& call, const Span& span, int64_t count)
      : result(span.rows, span.all, call.problem.width, span.first, count) {
    result.stream = result.stream && call.group_width % LANES == 0;
  }
  // LANES columns, or as many as there are before `end`.
  void operator()(int64_t row, int64_t column, int64_t end, Floats value) const {
    put<Storage>(result.row[row], column, value, end, result.stream);
  }
  // The same of several rows: value(i) is that of row + i.
  template <class Value>
  void operator()(int64_t row, int64_t rows, int64_t column, int64_t end, const Value& value) const {
    typedef typename Storage::Element Element;
    char* const* const out = result.row + row;
    if (end - column < LANES) {
      for (int64_t i = 0; i < rows; ++i) store_some<Storage>((Element*)out[i] + column, value(i), end - column);
    } else if (result.stream) {
      for (int64_t i = 0; i < rows; ++i) stream_as((Element*)out[i] + column, Storage::as_stored(value(i)));
    } else {
      for (int64_t i = 0; i < rows; ++i) store_as((Element*)out[i] + column, Storage::as_stored(value(i)));
    }
  }
};

// y, from the v that project(action) hands out. What a residual adds of the normed rows is normed again: as operands
// they may be rounded.
template <class Project>
void write_results(const Call& call, const Adapter& adapter, const Span& x, const Span& output, int64_t count,
                   const Tile& tile, const Project& project) {
  const SkipAdapter& problem = call.problem;
  const int64_t width = problem.width;
  const char* x_row[MOST_TILE_ROWS];
  for (int64_t i = 0; i < count; ++i) x_row[i] = x.row(i);
  with_storage(x.rows.dtype, [&](auto x_storage) {
    with_storage(output.rows.dtype, [&](auto storage) {
      typedef decltype(x_storage) In;
      const Output<decltype(storage)> write(call, output, count);
      // v(i), and what is added to it, of some rows.
      const auto finish = [&](int64_t row, int64_t rows, int64_t column, int64_t end, const auto& v) {
        const char* const* const in = x_row + row;
        if (problem.residual == SkipResidual::NONE) return write(row, rows, column, end, v);
        if (problem.residual == SkipResidual::INPUT)
          return write(row, rows, column, end, [=](int64_t i) { return v(i) + get<In>(in[i], column, end); });
        const Floats weight = load(adapter.norm_weight + column), bias = load(adapter.norm_bias + column);
        write(row, rows, column, end, [=, of = tile.moments + row](int64_t i) {
          const Floats added = get<In>(in[i], column, end);
          return v(i) + added + normed(added, of[i], weight, bias);
        });
      };
      if (problem.norm != SkipNorm::LAYER_AFTER)
        return project([&](const UpColumns& v) {
          finish(v.row, v.rows, v.column, v.end, [v](int64_t i) { return v[i]; });
        });
      project([&](const UpColumns& v) { keep_results(v, tile); });
      for (int64_t i = 0; i < count; ++i) {
        const float* row = tile.results + i * tile.wide;
        const Moments of = moments(row, width, false, problem.eps);
        for (int64_t c = 0; c < width; c += LANES)
          finish(i, 1, c, width, [&](int64_t) {
            return normed(load(row + c), of, load(adapter.norm_weight + c), load(adapter.norm_bias + c));
          });
      }
    });
  });
}

// The same, of the rows of t in tile.hidden.
template <class Dot>
void write_results(const Call& call, const Adapter& adapter, const Span& x, const Span& output, int64_t count,
                   const Tile& tile) {
  const float* weighted = hidden_as_words<Dot>(call, tile.hidden, count, call.problem.groups, tile, tile.weighted);
  write_results(call, adapter, x, output, count, tile, [&](const auto& action) {
    project_up<Dot>(call, adapter, weighted, count, tile, action);
  });
}

}  // namespace
}  // namespace fast_prompt::cpu::FAST_PROMPT_ISA
