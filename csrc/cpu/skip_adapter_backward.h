// The backward of skip_adapter. h comes from the forward; what went into later adapters of a run is computed again from
// it. With g the gradient of y, dv that of v (g itself, but for a norm behind), for each adapter of a tile, last first:
//
//   q = W_u^T dv    dh = s q act'(h)    dz = W_d^T dh    dx = g + that of the norm, from dz
//   dW_u = s sum of dv (x) t            dW_d = sum of dh (x) z            ds = sum of q.t + dv.b_u
//
// Each thread adds up sums of its own, a last step adds those in thread order: a result depends on the number of
// threads alone. Those of the weights are [adapter_width, width], and s is multiplied in at the end. A mixture's sums
// are first those of one sample; with them its gates' gradients are dot products with the experts.

#pragma once

#include "skip_adapter_steps.h"

namespace fast_prompt::cpu::FAST_PROMPT_ISA {
namespace {

// What one thread adds up; null where no gradient needs it. An expert of a mixture counts as an adapter of `up`.
struct Sums {
  int64_t wide, group_wide, tall;  // strides
  float *down, *up;                // [adapters, adapter_width], rows of wide and of group_wide
  float *down_bias, *up_bias, *norm_weight, *norm_bias;  // [adapters], rows of tall or of wide
  double *scale, *gates;                                 // [adapters], [batch, experts]
  float *sample_up, *sample_up_bias;                     // of a mixture's sample
  int64_t floats;
};

Sums make_sums(const Call& call, const SkipAdapterGradients& gradients, float* memory) {
  const SkipAdapter& problem = call.problem;
  const int64_t ups = problem.adapters * problem.experts;
  Sums sums{};
  sums.wide = spread_stride(packed_columns(problem.width));
  sums.group_wide = spread_stride(packed_columns(call.group_width));
  sums.tall = round_up(problem.adapter_width, 16);
  float* const start = memory;
  const auto take = [&memory](bool needed, int64_t floats) {
    float* taken = needed ? memory : nullptr;
    memory += needed ? round_up(floats, 16) : 0;
    return taken;
  };
  sums.down = take(gradients.down_weight.data, problem.adapters * problem.adapter_width * sums.wide);
  sums.up = take(gradients.up_weight.data, ups * problem.adapter_width * sums.group_wide);
  sums.down_bias = take(gradients.down_bias.data, problem.adapters * sums.tall);
  sums.up_bias = take(gradients.up_bias.data, ups * sums.wide);
  sums.norm_weight = take(gradients.norm_weight.data, problem.adapters * sums.wide);
  sums.norm_bias = take(gradients.norm_bias.data, problem.adapters * sums.wide);
  sums.scale = (double*)take(gradients.scale, 2 * problem.adapters);
  sums.gates = (double*)take(gradients.gates, 2 * problem.batch * problem.experts);
  const bool mixed = problem.gates;
  sums.sample_up =
      take(mixed && (gradients.up_weight.data || gradients.gates), problem.adapter_width * sums.group_wide);
  sums.sample_up_bias = take(mixed && (gradients.up_bias.data || gradients.gates), sums.wide);
  sums.floats = memory - start;
  return sums;
}

// What the steps of a backward share.
struct Pass {
  const Call& call;
  const SkipAdapterGradients& gradients;
  const float* experts;  // W_u as floats, [experts, adapter_width], rows of sums.group_wide; for the gradients of gates
  const float* biases;   // b_u, [experts], padded rows

  bool wants_hidden_gradient(bool needs_x) const {
    return needs_x || gradients.down_weight.data || gradients.down_bias.data || wants_normed_gradient(needs_x);
  }
  bool wants_normed_gradient(bool needs_x) const {
    return needs_x || (call.normed_before && (gradients.norm_weight.data || gradients.norm_bias.data));
  }
  Forms forms() const {
    const SkipAdapter& problem = call.problem;
    const bool again = problem.norm == SkipNorm::LAYER_AFTER || (!problem.route && problem.adapters > 1);
    return {false, again, true, true};
  }
};

float* row_of(float* sums, int64_t index, int64_t stride) { return sums ? sums + index * stride : nullptr; }

// t of the tile's rows, from the h that the forward kept; and the slopes, unless they are not asked for.
void recall_hidden(const Pass& pass, int64_t layer, const Block& block, const Tile& tile, float* slopes) {
  const Call& call = pass.call;
  const int64_t width = call.problem.adapter_width, row = layer * call.all_rows() + block.first;
  with_storage(call.problem.hidden_dtype, [&](auto storage) {
    typedef decltype(storage) Storage;
    for (int64_t i = 0; i < block.count; ++i) {
      const char* kept = (const char*)pass.gradients.hidden + (row + i) * width * sizeof(typename Storage::Element);
      for_each_vector<Storage>(width, [&](int64_t c, auto load_row, auto) {
        store(tile.hidden + i * tile.tall + c, load_row(kept));
      });
    }
  });
  activate_rows(call, row, block.count, tile, slopes);
}

// dv in tile.results, through the norm behind.
template <class Dot>
Span differentiate_norm_after(const Call& call, const Adapter& adapter, const float* weighted, const Span& grad,
                              int64_t count, const Tile& tile, float* weight_sums, float* bias_sums) {
  const int64_t width = call.problem.width;
  project_up<Dot>(call, adapter, weighted, count, tile, [&](const UpColumns& v) { keep_results(v, tile); });
  for (int64_t i = 0; i < count; ++i) {
    float* row = tile.results + i * tile.wide;
    norm_backward(row, moments(row, width, false, call.problem.eps), false, adapter.norm_weight,
                  as_floats(grad.rows.dtype, grad.row(i), width, tile.row), width, weight_sums, bias_sums,
                  [row](int64_t c, Floats value) { store(row + c, value); });
  }
  return tile.span(tile.results);
}

// dv as words, group after group.
template <class Dot>
Operand grad_as_words(const Call& call, const Span& grad, int64_t count, const Tile& tile) {
  const int64_t width = call.problem.width;
  if (group_step<Dot>(call, call.group_width) == call.group_width)
    return as_operand<Dot>(grad.rows, grad.first, count, width, tile.grad, tile.wide);
  stage_groups<Dot>(call, grad, count, call.problem.groups, call.group_width, tile.grad, tile.wide);
  return {tile.grad, tile.wide};
}

// q in tile.gradients.
template <class Dot>
void project_back(const Call& call, const Adapter& adapter, const Operand& grad, int64_t count, const Ahead& ahead,
                  const Tile& tile) {
  const int64_t depth = words<Dot>(call.group_width), columns = packed_columns(call.group_hidden);
  for (int64_t group = 0; group < call.problem.groups; ++group)
    multiply_in_slices<Dot>({count, columns, depth,
                                 grad.words + group * group_step<Dot>(call, call.group_width) / Dot::DEPTH, grad.stride,
                                 adapter.up_gradient + group * depth * columns,
                                 tile.gradients + group * call.group_hidden, tile.tall, false, ahead});
}

// ds of a row.
float scale_gradient(const Call& call, const Adapter& adapter, const float* q, const float* t, const float* dv) {
  const float hidden =
      sum_row(call.problem.adapter_width, [=](int64_t, auto load_row) { return load_row(q) * load_row(t); });
  if (!call.problem.up_bias.data) return hidden;
  return hidden +
         sum_row(call.problem.width, [=](int64_t, auto load_row) { return load_row(dv) * load_row(adapter.up_bias); });
}

// q -> dh, row by row; adds up the gradients of the scale and of both biases.
void differentiate_rows(const Call& call, const Adapter& adapter, const Span& grad, int64_t count, const Tile& tile,
                        double* scale, float* up_bias, float* down_bias) {
  const int64_t width = call.problem.width, hidden_width = call.problem.adapter_width;
  for (int64_t i = 0; i < count; ++i) {
    float* q = tile.gradients + i * tile.tall;
    const float* slope = tile.slopes + i * tile.tall;
    if (scale || up_bias) {
      const float* dv = as_floats(grad.rows.dtype, grad.row(i), width, tile.row);
      if (scale) *scale += scale_gradient(call, adapter, q, tile.hidden + i * tile.tall, dv);
      if (up_bias)
        for_each_vector<Float32>(width, [=](int64_t, auto load_row, auto store_row) {
          store_row(up_bias, load_row(up_bias) + load_row(dv));
        });
    }
    for (int64_t c = 0; c < hidden_width; c += LANES) store(q + c, load(q + c) * load(slope + c) * adapter.scale);
    if (down_bias)
      for_each_vector<Float32>(hidden_width, [=](int64_t, auto load_row, auto store_row) {
        store_row(down_bias, load_row(down_bias) + load_row(q));
      });
  }
}

// dx from dz = dh W_d, of the rows of dh; `result` is absent where only the norm's parameters need it.
template <class Dot>
void write_gradients(const Call& call, const Adapter& adapter, const float* dh, const Span& x, const Span& grad,
                     const Span& result, int64_t count, const Tile& tile, float* weight_sums, float* bias_sums) {
  const SkipAdapter& problem = call.problem;
  const int64_t width = problem.width;
  const Product product{count, packed_columns(width), words<Dot>(problem.adapter_width), dh, tile.tall,
                        adapter.down_gradient, nullptr, 0, false, {}};
  const bool direct = problem.residual != SkipResidual::NONE, through_norm = problem.residual == SkipResidual::NORMED;
  const Dtype type = result.rows.data ? result.rows.dtype : Dtype::FLOAT32;
  const auto finish_blocks = [&](auto storage, bool add_grad, auto finish) {
    multiply_blocks<Dot>(product, [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums) {
      for (int64_t i = 0; i < rows; ++i) {
        const char* g = grad.row(row + i);
        for (int64_t c = 0; c < columns; c += LANES) {
          const Floats dz = load(sums + i * PANEL + c);
          finish(row + i, column + c, add_grad ? dz + get<decltype(storage)>(g, column + c, width) : dz);
        }
      }
    });
  };
  with_storage(grad.rows.dtype, [&](auto grad_storage) {
    with_storage(type, [&](auto storage) {
      typedef decltype(storage) Storage;
      if (!call.normed_before) {
        const Output<Storage> write(call, result, count);
        return finish_blocks(grad_storage, direct,
                             [&](int64_t row, int64_t column, Floats value) { write(row, column, width, value); });
      }
      finish_blocks(grad_storage, through_norm, [&](int64_t row, int64_t column, Floats value) {
        store(tile.normed_grad + row * tile.wide + column, value);
      });
      for (int64_t i = 0; i < count; ++i) {
        const float* row = as_floats(x.rows.dtype, x.row(i), width, tile.row);
        const Moments of = moments(row, width, call.rms, problem.eps);
        const float* dz = tile.normed_grad + i * tile.wide;
        const auto differentiate = [&](auto action) {
          norm_backward(row, of, call.rms, adapter.norm_weight, dz, width, weight_sums, bias_sums, action);
        };
        if (!result.rows.data) {
          differentiate([](int64_t, Floats) {});
          continue;
        }
        const char* g = grad.row(i);
        const Output<Storage> write(call, {result.rows, result.first + i, result.all}, 1);
        differentiate([&](int64_t c, Floats value) {
          write(0, c, width, direct ? value + get<decltype(grad_storage)>(g, c, width) : value);
        });
      }
    });
  });
}

// One adapter's part of a backward, on a tile's rows of x and of g.
template <class Dot>
void backward_adapter(const Pass& pass, const Adapter& adapter, int64_t index, int64_t layer, const Block& block,
                      const Span& x, const Span& grad, const Span& result, const Ahead& ahead, const Tile& tile,
                      const Sums& sums) {
  const Call& call = pass.call;
  const SkipAdapter& problem = call.problem;
  const int64_t count = block.count, width = problem.width, hidden_width = problem.adapter_width;
  recall_hidden(pass, layer, block, tile, tile.slopes);
  const float* weighted = hidden_as_words<Dot>(call, tile.hidden, count, problem.groups, tile, tile.weighted);
  float* norm_weight = row_of(sums.norm_weight, index, sums.wide);
  float* norm_bias = row_of(sums.norm_bias, index, sums.wide);
  Span dv = grad;
  if (problem.norm == SkipNorm::LAYER_AFTER)
    dv = differentiate_norm_after<Dot>(call, adapter, weighted, grad, count, tile, norm_weight, norm_bias);
  const Operand dv_words = grad_as_words<Dot>(call, dv, count, tile);
  project_back<Dot>(call, adapter, dv_words, count, ahead, tile);
  float* up_bias = problem.gates ? sums.sample_up_bias : row_of(sums.up_bias, index, sums.wide);
  differentiate_rows(call, adapter, dv, count, tile, sums.scale ? sums.scale + index : nullptr, up_bias,
                     row_of(sums.down_bias, index, sums.tall));
  float* up = problem.gates ? sums.sample_up : row_of(sums.up, index, hidden_width * sums.group_wide);
  for (int64_t group = 0; up && group < problem.groups; ++group) {
    const Operand t{weighted + group * group_step<Dot>(call, call.group_hidden) / Dot::DEPTH, tile.tall};
    const Operand g{dv_words.words + group * group_step<Dot>(call, call.group_width) / Dot::DEPTH, dv_words.stride};
    add_outer_products<Dot>(t, call.group_hidden, g, call.group_width, count, true,
                            up + group * call.group_hidden * sums.group_wide, sums.group_wide, tile.transposed,
                            tile.panel);
  }
  if (!pass.wants_hidden_gradient(result.rows.data)) return;
  const float* dh = hidden_as_words<Dot>(call, tile.gradients, count, 1, tile, tile.gradient_words);
  if (sums.down)
    add_outer_products<Dot>({dh, tile.tall}, hidden_width, norm_rows<Dot>(call, adapter, x, count, tile), width, count,
                            true, sums.down + index * hidden_width * sums.wide, sums.wide, tile.transposed, tile.panel);
  if (pass.wants_normed_gradient(result.rows.data))
    write_gradients<Dot>(call, adapter, dh, x, grad, result, count, tile, call.normed_before ? norm_weight : nullptr,
                         call.normed_before ? norm_bias : nullptr);
}

template <class Dot>
void backward_block(const Pass& pass, const Adapter* adapters, const Block& block, const Tile& tile, const Sums& sums) {
  const Call& call = pass.call;
  const SkipAdapter& problem = call.problem;
  const int64_t first = problem.route ? problem.route[block.sample] : 0;
  const int64_t count = problem.route ? 1 : problem.adapters, buffer = tile_rows(call) * tile.wide;
  const auto x_of = [&](int64_t i) {
    return i == 0 ? Span{problem.x, block.first, 0} : tile.span(tile.between + (i - 1) * buffer);
  };
  for (int64_t i = 0; i + 1 < count; ++i) {
    const Adapter& adapter = adapters[first + i];
    if (problem.residual == SkipResidual::NORMED) norm_rows<Dot>(call, adapter, x_of(i), block.count, tile);
    recall_hidden(pass, i, block, tile, nullptr);
    write_results<Dot>(call, adapter, x_of(i), x_of(i + 1), block.count, tile);
  }
  const int64_t next = block.first + block.count, ahead = smaller(block.count, call.all_rows() - next);
  const Ahead wanted = rows_ahead(pass.gradients.grad, next, problem.x, next, ahead, problem.width);
  Span grad{pass.gradients.grad, block.first, 0};
  for (int64_t i = count - 1; i >= 0; --i) {
    const Span result = i > 0 ? tile.span(tile.passed) : Span{pass.gradients.x, block.first, call.all_rows()};
    backward_adapter<Dot>(pass, adapters[first + i], first + i, i, block, x_of(i), grad, result,
                          i == count - 1 ? wanted : Ahead{}, tile, sums);
    grad = result;
  }
}

// ---- A mixture's sample ----

float dot_rows(const float* a, const float* b, int64_t width) {
  return sum_row(width, [=](int64_t, auto load_row) { return load_row(a) * load_row(b); });
}

void add_row(float* sum, const float* row, float factor, int64_t width) {
  for_each_vector<Float32>(width, [=](int64_t, auto load_row, auto store_row) {
    store_row(sum, load_row(sum) + load_row(row) * factor);
  });
}

// Hands a sample's sums on to every expert and gate, and begins anew.
void finish_sample(const Pass& pass, int64_t sample, const Sums& sums) {
  const SkipAdapter& problem = pass.call.problem;
  const int64_t width = problem.width, rows = problem.adapter_width, group_width = pass.call.group_width;
  const int64_t padded = round_up(width, LANES) + LANES;
  for (int64_t expert = 0; expert < problem.experts; ++expert) {
    const float gate = problem.gates[sample * problem.experts + expert];
    double along = 0;
    for (int64_t row = 0; sums.sample_up && row < rows; ++row) {
      const float* sum = sums.sample_up + row * sums.group_wide;
      const int64_t place = (expert * rows + row) * sums.group_wide;
      if (sums.gates) along += dot_rows(sum, pass.experts + place, group_width);
      if (sums.up) add_row(sums.up + place, sum, gate, group_width);
    }
    if (sums.gates && problem.up_bias.data)
      along += dot_rows(sums.sample_up_bias, pass.biases + expert * padded, width);
    if (sums.gates) sums.gates[sample * problem.experts + expert] += along;
    if (sums.up_bias) add_row(sums.up_bias + expert * sums.wide, sums.sample_up_bias, gate, width);
  }
  if (sums.sample_up) memset(sums.sample_up, 0, rows * sums.group_wide * sizeof(float));
  if (sums.sample_up_bias) memset(sums.sample_up_bias, 0, sums.wide * sizeof(float));
}

// W_u as the sums of its gradient lie: [experts, adapter_width], rows of a group's columns.
const float* transpose_experts(const Call& call, int64_t stride) {
  const SkipAdapter& problem = call.problem;
  float* experts = allocate_floats(call.runtime, problem.experts * problem.adapter_width * stride);
  parallel_for(call.runtime, problem.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * call.group_width; row < end * call.group_width; ++row)
      for (int64_t expert = 0; expert < problem.experts; ++expert)
        with_storage(problem.up_weight.dtype, [&](auto storage) {
          typedef decltype(storage) Storage;
          const void* source = at(problem.up_weight, row, expert * call.group_hidden);
          const int64_t first = expert * problem.adapter_width + row / call.group_width * call.group_hidden;
          for (int64_t c = 0; c < call.group_hidden; c += LANES) {
            const Floats value = get<Storage>(source, c, call.group_hidden);
            for (int64_t lane = 0; lane < smaller(LANES, call.group_hidden - c); ++lane)
              experts[(first + c + lane) * stride + row % call.group_width] = value[lane];
          }
        });
  });
  return experts;
}

// ---- The sums of all threads ----

struct AllSums {
  float* memory;
  int64_t count, between;  // threads, and floats from the sums of one to those of the next
};

// The sum over the threads of a register at `place` of the first one's sums.
Floats total(const AllSums& all, const float* place) {
  Floats sum = load(place);
  for (int64_t run = 1; run < all.count; ++run) sum += load(place + run * all.between);
  return sum;
}

void write_rows(const Call& call, const AllSums& all, const Rows& target, const float* sums, int64_t count,
                int64_t stride, int64_t width, const Adapter* scaled_by) {
  if (!target.data) return;
  parallel_for(call.runtime, count, 1 + PACK_GRAIN / (width * all.count), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      with_storage(target.dtype, [&](auto storage) {
        const float scale = scaled_by ? scaled_by[row / call.problem.experts].scale : 1.0f;
        for (int64_t c = 0; c < width; c += LANES)
          put<decltype(storage)>(at(target, row), c, total(all, sums + row * stride + c) * scale, width, false);
      });
  });
}

// dW_u [adapters, width, experts * group_hidden] from sums [adapters * experts, adapter_width, group_wide]: a block of
// LANES rows and LANES columns at a time.
void write_up(const Call& call, const AllSums& all, const Rows& target, const Sums& sums, const Adapter* adapters) {
  const SkipAdapter& problem = call.problem;
  if (!target.data) return;
  const int64_t columns = problem.experts * call.group_hidden, blocks = (call.group_width + LANES - 1) / LANES;
  const auto write_block = [&](int64_t adapter, int64_t group, int64_t block, int64_t first_column) {
    alignas(64) float turned[LANES][LANES];
    for (int64_t i = 0; i < smaller(LANES, columns - first_column); ++i) {
      const int64_t column = first_column + i, expert = column / call.group_hidden;
      const int64_t row = (adapter * problem.experts + expert) * problem.adapter_width + group * call.group_hidden +
                          column % call.group_hidden;
      const Floats sum = total(all, sums.up + row * sums.group_wide + block * LANES) * adapters[adapter].scale;
      for (int64_t lane = 0; lane < LANES; ++lane) turned[lane][i] = sum[lane];
    }
    const int64_t first = adapter * problem.width + group * call.group_width + block * LANES;
    with_storage(target.dtype, [&](auto storage) {
      for (int64_t lane = 0; lane < smaller(LANES, call.group_width - block * LANES); ++lane)
        put<decltype(storage)>(at(target, first + lane), first_column, load(turned[lane]), columns, false);
    });
  };
  const int64_t jobs = problem.adapters * problem.groups * blocks;
  parallel_for(call.runtime, jobs, 1 + PACK_GRAIN / (LANES * columns * all.count), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job)
      for (int64_t column = 0; column < columns; column += LANES)
        write_block(job / blocks / problem.groups, job / blocks % problem.groups, job % blocks, column);
  });
}

void write_numbers(const AllSums& all, float* target, const double* sums, int64_t count, float scale) {
  for (int64_t i = 0; target && i < count; ++i) {
    double sum = 0;
    for (int64_t run = 0; run < all.count; ++run) sum += *(const double*)((const float*)(sums + i) + run * all.between);
    target[i] = (float)(sum * scale);
  }
}

void write_sums(const Call& call, const SkipAdapterGradients& gradients, const AllSums& all, const Adapter* adapters) {
  const SkipAdapter& problem = call.problem;
  const Sums sums = make_sums(call, gradients, all.memory);
  const int64_t count = problem.adapters, width = problem.width, hidden_width = problem.adapter_width;
  write_rows(call, all, gradients.down_weight, sums.down, count * hidden_width, sums.wide, width, nullptr);
  write_up(call, all, gradients.up_weight, sums, adapters);
  write_rows(call, all, gradients.down_bias, sums.down_bias, count, sums.tall, hidden_width, nullptr);
  write_rows(call, all, gradients.up_bias, sums.up_bias, count * problem.experts, sums.wide, width, adapters);
  write_rows(call, all, gradients.norm_weight, sums.norm_weight, count, sums.wide, width, nullptr);
  write_rows(call, all, gradients.norm_bias, sums.norm_bias, count, sums.wide, width, nullptr);
  write_numbers(all, gradients.scale, sums.scale, count, 1.0f);
  write_numbers(all, gradients.gates, sums.gates, problem.batch * problem.experts, adapters[0].scale);
}

template <class Dot>
void backward_with(const SkipAdapter& problem, const SkipAdapterGradients& gradients, const Runtime& runtime) {
  const Call call = make_call(problem, runtime);
  Pass pass{call, gradients, nullptr, nullptr};
  const Forms forms = pass.forms();
  const Adapter* adapters = prepare_adapters<Dot>(call, forms);
  const int64_t sum_floats = make_sums(call, gradients, nullptr).floats;
  if (gradients.gates) {
    pass.experts = transpose_experts(call, make_sums(call, gradients, nullptr).group_wide);
    pass.biases = stage_parameter(runtime, problem.up_bias, problem.experts, problem.width);
  }
  const int64_t least = rows_worth_a_thread(call);
  const Run runs = call.rows() ? split_rows(runtime, call.rows(), least > 64 ? least : 64) : Run{1, 0};
  const int64_t rows = tile_rows(call), floats = make_tile(call, rows, true, nullptr).floats;
  float* scratch = allocate_floats(runtime, runs.count * floats);
  const AllSums all{allocate_floats(runtime, runs.count * sum_floats), runs.count, sum_floats};
  Mixture* mixtures = allocate<Mixture>(runtime, runs.count);
  for (int64_t run = 0; run < runs.count; ++run) mixtures[run] = allocate_mixture<Dot>(call, forms);
  parallel_for(runtime, runs.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const Tile tile = make_tile(call, rows, true, scratch + run * floats);
      memset(all.memory + run * sum_floats, 0, sum_floats * sizeof(float));
      const Sums sums = make_sums(call, gradients, all.memory + run * sum_floats);
      int64_t mixed = -1;
      Adapter own;
      for_each_block(call, run * runs.rows, smaller(call.rows(), (run + 1) * runs.rows), [&](const Block& block) {
        if (problem.gates && mixed != block.sample) {
          if (mixed >= 0) finish_sample(pass, mixed, sums);
          own = mix<Dot>(call, adapters[0], mixed = block.sample, mixtures[run]);
        }
        backward_block<Dot>(pass, problem.gates ? &own : adapters, block, tile, sums);
      });
      if (mixed >= 0) finish_sample(pass, mixed, sums);
    }
    finish_streams();
  });
  write_sums(call, gradients, all, adapters);
}

}  // namespace
}  // namespace fast_prompt::cpu::FAST_PROMPT_ISA
