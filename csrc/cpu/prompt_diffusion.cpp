// prompt_diffusion on the CPU, forward and backward: see ../prompt_diffusion.h for what it computes.
//
// Rows are cut into one run per thread, runs into tiles. A tile is carried through every step while its rows are
// in cache, so X, H and G are read once and Y, dX and dH written once, whatever p is; nothing of size [rows, p] is
// ever stored. Forward, a tile of rows: X as words, where it lies if it can be; S = X K^T; w R in place; and a register
// block at a time, E = (w R) P; Y = e^s (H + E). Backward: S and R again; D = G P^T; dS; dX = dS K; and dP += (e^s w R)^T G, dK += dS^T X into sums that each
// thread owns and a last step adds up in thread order, so that a result depends on the thread count alone.
//
// bf16 activations on a machine with bf16 dot products stay bf16 as operands (w R and dS are rounded to bf16, as
// eager PyTorch rounds them); everything else is widened to float32. The sums are float32 in both cases.

#include "../prompt_diffusion.h"

#include <math.h>

#include "gemm.h"
#include "parallel.h"
#include "philox.h"
#include "tiles.h"
#include "vector.h"

namespace fast_prompt::cpu::FAST_PROMPT_ISA {
namespace {

struct Call : PromptDiffusion {
  float scale;  // e^s
  bool softmax, max_weight;
};

// ---- Packed weights ----

// Panels of B = W^T, [width, n]: what X K^T and G P^T multiply by.
template <class Dot, Part part = Part::WHOLE>
const float* pack_all_transposed(const Runtime& runtime, const Rows& w, int64_t n, int64_t width) {
  const int64_t depth = words<Dot>(width), panels = (n + PANEL - 1) / PANEL;
  float* packed = allocate_floats(runtime, depth * packed_columns(n));
  parallel_for(runtime, panels, 1 + PACK_GRAIN / (width * PANEL), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pack_transposed<Dot, part>(w, i * PANEL, n, width, packed + i * PANEL * depth);
  });
  return packed;
}

// Panels of B = W, [n, width]: what (w R) P and dS K multiply by.
template <class Dot>
const float* pack_all(const Runtime& runtime, const Rows& w, int64_t n, int64_t width) {
  const int64_t depth = words<Dot>(n), panels = (width + PANEL - 1) / PANEL;
  float* packed = allocate_floats(runtime, depth * packed_columns(width));
  parallel_for(runtime, panels, 1 + PACK_GRAIN / (n * PANEL), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i * PANEL, columns = smaller(PANEL, packed_columns(width) - column);
      pack<Dot>(w, n, column, columns, width, packed + column * depth);
    }
  });
  return packed;
}

// ---- One row of scores. Rows are padded to whole registers; the padding always holds zeros. ----

// S -> relu(S) or softmax(S), in place.
void activate(const Call& problem, float* s) {
  const int64_t p = problem.num_prompts, padded = packed_columns(p);
  for (int64_t c = p; c < padded; ++c) s[c] = problem.softmax ? -__builtin_inff() : 0.0f;
  if (!problem.softmax) {
    for (int64_t c = 0; c < padded; c += LANES) {
      const Floats value = load(s + c);
      store(s + c, value < 0.0f ? Floats{} : value);  // keeps NaN
    }
    return;
  }
  Floats largest = load(s), sum = {};
  for (int64_t c = LANES; c < padded; c += LANES) largest = larger(largest, load(s + c));
  const float shift = largest_lane(largest);
  for (int64_t c = 0; c < padded; c += LANES) {
    const Floats value = exp_of_nonpositive(load(s + c) - shift);
    store(s + c, value);
    sum += value;
  }
  const float factor = 1.0f / sum_of_lanes(sum);
  for (int64_t c = 0; c < padded; c += LANES) store(s + c, load(s + c) * factor);
}

// w of a row of activations whose elements count kept[c] times; NaN if one of them is NaN.
float row_weight(const Call& problem, const float* activations, const float* kept) {
  if (!problem.max_weight) return 1.0f;
  Floats largest = {}, not_a_number = {};
  for (int64_t c = 0; c < problem.num_prompts; c += LANES) {
    const Floats r = load(activations + c) * load(kept + c);
    largest = larger(r, largest);
    not_a_number = r == r ? not_a_number : r;
  }
  return largest_lane(largest) + sum_of_lanes(not_a_number);
}

// kept[c] for a row: 0 or 1 / (1 - dropout_p). Without dropout the ones written by keep_all stay.
void draw_dropout(const Call& problem, int64_t row, float* kept) {
  const uint64_t first = (uint64_t)row * problem.num_prompts;
  dropout_factors(problem.dropout, first, problem.num_prompts, kept);
}

void keep_all(const Call& problem, float* kept) {
  for (int64_t c = 0; c < problem.num_prompts; c += LANES) store(kept + c, broadcast(1.0f));
}

// S -> factor w R.
void weigh_scores(const Call& problem, float factor, float* s, const float* kept) {
  activate(problem, s);
  factor *= row_weight(problem, s, kept);
  for (int64_t c = 0; c < problem.num_prompts; c += LANES) store(s + c, load(s + c) * load(kept + c) * factor);
}

// S and D = G P^T -> e^s w R and dS, in place.
void differentiate_scores(const Call& problem, float* s, float* d, const float* kept) {
  activate(problem, s);
  const float factor = problem.scale * row_weight(problem, s, kept);
  const int64_t p = problem.num_prompts;
  Floats sum = {};
  for (int64_t c = 0; c < p; c += LANES) {
    const Floats a = load(s + c);
    const Floats da = load(d + c) * load(kept + c) * factor;
    sum += a * da;
    store(d + c, problem.softmax ? da : a <= 0.0f ? Floats{} : da);
  }
  const float total = sum_of_lanes(sum);
  for (int64_t c = 0; c < p; c += LANES) {
    const Floats a = load(s + c);
    if (problem.softmax) store(d + c, a * (load(d + c) - total));
    store(s + c, a * load(kept + c) * factor);
  }
}

// ---- One row of activations, in its own dtype ----

template <class Storage>
float dot(const void* a, const void* b, int64_t width) {
  Floats sum = {};
  for_each_vector<Storage>(width, [=, &sum](int64_t, auto load_row, auto) { sum += load_row(a) * load_row(b); });
  return sum_of_lanes(sum);
}

// ---- Tiles ----

// Rows whose arithmetic is worth waking a thread for.
int64_t rows_worth_a_thread(const Call& problem) {
  return 1 + (1 << 18) / (problem.width * (problem.num_prompts + 8));
}

// Scratch of one tile, carved from one allocation. Strides are in words.
struct Tile {
  int64_t rows;
  int64_t wide, tall;                       // strides of [rows, width] and [rows, num_prompts] buffers
  float *source, *grad, *scores, *dscores;  // staged X and G; S and D
  float *operand, *transposed, *panel;      // w R or dS as words; the same by columns; a panel of X or G
  float* kept;

  Tile(const Call& problem, int64_t tile_rows, bool backward, float* memory = nullptr)
      : rows(tile_rows),
        wide(spread_stride(packed_columns(problem.width))),
        tall(spread_stride(packed_columns(problem.num_prompts))) {
    float* const start = memory;
    const auto take = [&memory](int64_t floats) {
      float* taken = memory;
      memory += round_up(floats, 16);
      return taken;
    };
    source = take(rows * wide);
    scores = take(rows * tall);
    operand = take(rows * tall);
    kept = take(tall);
    if (backward) {
      grad = take(rows * wide);
      dscores = take(rows * tall);
      transposed = take(rows * tall);
      panel = take(rows * PANEL);
    }
    floats = memory - start;
  }
  int64_t floats;  // size of the allocation
};

// Rows of float32 scores as words: as they are, or copied to `operand`.
template <class Dot>
const float* as_words(const float* scores, int64_t count, int64_t columns, int64_t stride, float* operand) {
  if constexpr (Dot::DEPTH == 1) return scores;
  for (int64_t i = 0; i < count; ++i)
    stage<Dot>(Dtype::FLOAT32, scores + i * stride, columns, operand + i * stride);
  return operand;
}

// ---- Forward ----

template <class Dot>
void forward_tile(const Call& problem, const float* keys, const float* prompts, const Rows& output,
                  const Tile& tile, int64_t first, int64_t count) {
  const int64_t width = problem.width, p = problem.num_prompts, next = first + count;
  const Operand source = as_operand<Dot>(problem.source, first, count, width, tile.source, tile.wide);
  multiply<Dot, Layout::ROWS>({count, packed_columns(p), words<Dot>(width), source.words, source.stride, keys,
                               tile.scores, tile.tall, false,
                               rows_ahead(problem.source, next, problem.hidden, first, count, width)});
  for (int64_t i = 0; i < count; ++i) {
    draw_dropout(problem, first + i, tile.kept);
    weigh_scores(problem, 1.0f, tile.scores + i * tile.tall, tile.kept);
  }
  const float* weighted = as_words<Dot>(tile.scores, count, p, tile.tall, tile.operand);
  with_storage(output.dtype, [&](auto storage) {
    typedef decltype(storage) Storage;
    const Result<Storage> result(output, problem.rows, width, first, count);
    const char* hidden[MOST_TILE_ROWS];
    for (int64_t i = 0; i < count; ++i) hidden[i] = at(problem.hidden, first + i);
    const Product product{count, packed_columns(width), words<Dot>(p), weighted, tile.tall, prompts,
                          nullptr, 0, false, {}};
    multiply_blocks<Dot>(product, [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* e) {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; c += LANES) {
          const Floats h = get<Storage>(hidden[row + i], column + c, width);
          result(row + i, column + c, (h + load(e + i * PANEL + c)) * problem.scale);
        }
    });
  });
}

// A handful of prompts leaves too little arithmetic to hide packing, padding and staging behind. So their forward
// reads X and H in place, a few rows at a time, and multiplies straight into and out of registers: at the speed
// of memory. Keys and prompts are float32 rows, zero rows filling up the last block.
constexpr int64_t FEW = 8;
constexpr int FEW_BLOCK = LANES == 16 ? 4 : 2;  // rows, and keys, whose products are summed at the same time

// Scores of R rows; meanwhile asks for the same columns of the rows in `soon`, `later`: those to be read next.
template <class Storage, int R>
void few_scores(const char* const* source, const char* const* soon, const char* const* later, const float* keys,
                int64_t stride, int64_t count, int64_t width, float* scores) {
  for (int64_t first = 0; first < count; first += FEW_BLOCK, keys += FEW_BLOCK * stride) {
    Floats sum[R][FEW_BLOCK] = {};
    for_each_vector<Storage>(width, [&](int64_t c, auto load_row, auto) __attribute__((always_inline)) {
      Floats x[R];
      for (int i = 0; i < R; ++i) {
        x[i] = load_row(source[i]);
        __builtin_prefetch(soon[i] + c * sizeof(typename Storage::Element));
        __builtin_prefetch(later[i] + c * sizeof(typename Storage::Element));
      }
      for (int j = 0; j < FEW_BLOCK; ++j) {
        const Floats key = load(keys + j * stride + c);
        for (int i = 0; i < R; ++i) sum[i][j] += x[i] * key;
      }
    });
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < FEW_BLOCK; ++j) scores[i * 2 * FEW + first + j] = sum_of_lanes(sum[i][j]);
  }
}

template <class Storage, int R>
void few_outputs(const float* scores, const float* prompts, int64_t stride, int64_t count,
                 const char* const* hidden, float scale, int64_t width, const Result<Storage>& result) {
  for_each_vector<Storage>(width, [&](int64_t c, auto load_row, auto) __attribute__((always_inline)) {
    Floats sum[R];
    for (int i = 0; i < R; ++i) sum[i] = load_row(hidden[i]);
    for (int64_t j = 0; j < count; ++j) {
      const Floats prompt = load(prompts + j * stride + c);
      for (int i = 0; i < R; ++i) sum[i] += prompt * scores[i * 2 * FEW + j];
    }
    for (int i = 0; i < R; ++i) result(i, c, sum[i] * scale);
  });
}

template <class Storage, int R>
void few_rows(const Call& problem, const float* keys, const float* prompts, int64_t stride,
              const Rows& output, int64_t first, float* kept) {
  const char *source[R], *hidden[R], *next[R];
  for (int i = 0; i < R; ++i) {
    next[i] = at(problem.source, smaller(first + R + i, problem.rows - 1));
    source[i] = at(problem.source, first + i);
    hidden[i] = at(problem.hidden, first + i);
  }
  float scores[R * 2 * FEW];
  few_scores<Storage, R>(source, hidden, next, keys, stride, problem.num_prompts, problem.width, scores);
  for (int i = 0; i < R; ++i) {
    draw_dropout(problem, first + i, kept);
    weigh_scores(problem, 1.0f, scores + i * 2 * FEW, kept);
  }
  const Result<Storage> result(output, problem.rows, problem.width, first, R);
  few_outputs<Storage, R>(scores, prompts, stride, problem.num_prompts, hidden, problem.scale, problem.width, result);
}

void forward_few(const Call& problem, const Rows& output, const Runtime& runtime) {
  const int64_t width = problem.width, p = problem.num_prompts, stride = spread_stride(packed_columns(width));
  float* keys = allocate_floats(runtime, round_up(p, FEW_BLOCK) * stride);
  float* prompts = allocate_floats(runtime, p * stride);
  memset(keys, 0, round_up(p, FEW_BLOCK) * stride * sizeof(float));
  stage_rows<Fp32>(problem.keys, 0, p, width, keys, stride);
  stage_rows<Fp32>(problem.prompts, 0, p, width, prompts, stride);
  const Run runs = split_rows(runtime, problem.rows, rows_worth_a_thread(problem));
  parallel_for(runtime, runs.count, 1, [&](int64_t begin, int64_t end) {
    float kept[2 * FEW];
    keep_all(problem, kept);
    const int64_t last = smaller(problem.rows, end * runs.rows);
    with_storage(output.dtype, [&](auto storage) {
      typedef decltype(storage) Storage;
      int64_t row = begin * runs.rows;
      for (; row + FEW_BLOCK <= last; row += FEW_BLOCK)
        few_rows<Storage, FEW_BLOCK>(problem, keys, prompts, stride, output, row, kept);
      for (; row < last; ++row) few_rows<Storage, 1>(problem, keys, prompts, stride, output, row, kept);
    });
    finish_streams();
  });
}

template <class Dot>
void forward_with(const Call& problem, const Rows& output, const Runtime& runtime) {
  const float* keys = pack_all_transposed<Dot>(runtime, problem.keys, problem.num_prompts, problem.width);
  const float* prompts = pack_all<Dot>(runtime, problem.prompts, problem.num_prompts, problem.width);
  const Run runs = split_rows(runtime, problem.rows, rows_worth_a_thread(problem));
  const int64_t tile_rows = 2 * BLOCK_ROWS;
  const int64_t floats = Tile(problem, tile_rows, false).floats;
  float* scratch = allocate_floats(runtime, runs.count * floats);
  parallel_for(runtime, runs.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const Tile tile(problem, tile_rows, false, scratch + run * floats);
      keep_all(problem, tile.kept);
      const int64_t last = smaller(problem.rows, (run + 1) * runs.rows);
      for (int64_t row = run * runs.rows; row < last; row += tile_rows)
        forward_tile<Dot>(problem, keys, prompts, output, tile, row, smaller(tile_rows, last - row));
    }
    finish_streams();
  });
}

// ---- Backward ----

// Packed weights, and what one run of rows adds up. Null where no gradient needs it.
struct BackwardRun {
  const float *keys_transposed, *keys_residual, *prompts_transposed, *keys;
  float *prompts_sum, *keys_sum;  // [num_prompts, tile.wide]
  double log_scale;
};

bool needs_scores(const PromptDiffusionGradients& gradients) {
  return gradients.source.data || gradients.prompts.data || gradients.keys.data;
}

bool needs_score_gradients(const PromptDiffusionGradients& gradients) {
  return gradients.source.data || gradients.keys.data;
}

// dH, and the gradient of log_scale: Y is e^s times what has no part in s.
void backward_hidden(const Call& problem, const PromptDiffusionGradients& gradients, int64_t first,
                     int64_t count, BackwardRun& run) {
  with_storage(gradients.grad.dtype, [&](auto storage) {
    typedef decltype(storage) Storage;
    if (gradients.hidden.data) {
      const Result<Storage> result(gradients.hidden, problem.rows, problem.width, first, count);
      for (int64_t i = 0; i < count; ++i)
        for_each_vector<Storage>(problem.width, [&](int64_t c, auto load_row, auto) __attribute__((always_inline)) {
          result(i, c, load_row(at(gradients.grad, first + i)) * problem.scale);
        });
    }
    for (int64_t row = first; gradients.log_scale && row < first + count; ++row)
      run.log_scale += dot<Storage>(at(gradients.grad, row), at(gradients.output, row), problem.width);
  });
}

template <class Dot>
void backward_tile(const Call& problem, const PromptDiffusionGradients& gradients, const Tile& tile,
                   int64_t first, int64_t count, bool accumulate, BackwardRun& run) {
  const int64_t width = problem.width, p = problem.num_prompts, padded = packed_columns(p);
  const int64_t next = first + count, ahead = smaller(count, problem.rows - next);
  backward_hidden(problem, gradients, first, count, run);
  if (!needs_scores(gradients)) return;

  const Operand source = as_operand<Dot>(problem.source, first, count, width, tile.source, tile.wide);
  const Operand grad = as_operand<Dot>(gradients.grad, first, count, width, tile.grad, tile.wide);
  Product scores{count, padded, words<Dot>(width), source.words, source.stride, run.keys_transposed,
                 tile.scores, tile.tall, false,
                 rows_ahead(problem.source, next, gradients.grad, next, ahead, width)};
  multiply<Dot, Layout::ROWS>(scores);
  if (run.keys_residual) {
    scores.b = run.keys_residual;
    scores.accumulate = true;
    multiply<Dot, Layout::ROWS>(scores);
  }
  if (needs_score_gradients(gradients))
    multiply<Dot, Layout::ROWS>({count, padded, words<Dot>(width), grad.words, grad.stride, run.prompts_transposed,
                                 tile.dscores, tile.tall, false,
                                 rows_ahead(gradients.output, next, gradients.output, next, ahead, width)});
  for (int64_t i = 0; i < count; ++i) {
    float *s = tile.scores + i * tile.tall, *d = tile.dscores + i * tile.tall;
    draw_dropout(problem, first + i, tile.kept);
    if (needs_score_gradients(gradients)) {
      differentiate_scores(problem, s, d, tile.kept);
    } else {
      weigh_scores(problem, problem.scale, s, tile.kept);
    }
  }

  if (run.prompts_sum) {
    const float* weighted = as_words<Dot>(tile.scores, count, p, tile.tall, tile.operand);
    add_outer_products<Dot>({weighted, tile.tall}, p, grad, width, count, accumulate, run.prompts_sum, tile.wide,
                            tile.transposed, tile.panel);
  }
  if (!gradients.source.data && !run.keys_sum) return;
  const float* dscores = as_words<Dot>(tile.dscores, count, p, tile.tall, tile.operand);
  if (run.keys_sum)
    add_outer_products<Dot>({dscores, tile.tall}, p, source, width, count, accumulate, run.keys_sum, tile.wide,
                            tile.transposed, tile.panel);
  if (gradients.source.data) {
    with_storage(gradients.source.dtype, [&](auto storage) {
      const Result<decltype(storage)> result(gradients.source, problem.rows, width, first, count);
      const Product product{count, packed_columns(width), words<Dot>(p), dscores, tile.tall, run.keys,
                            nullptr, 0, false, {}};
      multiply_blocks<Dot>(product, [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* dx) {
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t c = 0; c < columns; c += LANES) result(row + i, column + c, load(dx + i * PANEL + c));
      });
    });
  }
}

// Adds up what the runs hold, in their order, and writes it.
void write_sums(const Runtime& runtime, const Rows& target, float* sums, int64_t count, int64_t between,
                int64_t stride, int64_t num_prompts, int64_t width) {
  parallel_for(runtime, num_prompts, 1 + PACK_GRAIN / (width * count), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* sum = sums + row * stride;
      for (int64_t run = 1; run < count; ++run)
        for (int64_t c = 0; c < width; c += LANES)
          store(sum + c, load(sum + c) + load(sum + run * between + c));
      with_storage(target.dtype, [&](auto storage) { write_row<decltype(storage)>(sum, width, at(target, row)); });
    }
  });
}

template <class Dot>
void backward_with(const Call& problem, const PromptDiffusionGradients& gradients,
                   const Runtime& runtime) {
  const int64_t p = problem.num_prompts, width = problem.width;
  BackwardRun shared{};
  if (needs_scores(gradients))
    shared.keys_transposed = pack_all_transposed<Dot>(runtime, problem.keys, p, width);
  // float32 keys rounded to bf16 would move scores across the ReLU's edge: multiply by what was lost as well.
  if (needs_scores(gradients) && Dot::DEPTH > 1 && problem.keys.dtype == Dtype::FLOAT32)
    shared.keys_residual = pack_all_transposed<Dot, Part::RESIDUAL>(runtime, problem.keys, p, width);
  if (needs_score_gradients(gradients))
    shared.prompts_transposed = pack_all_transposed<Dot>(runtime, problem.prompts, p, width);
  if (gradients.source.data) shared.keys = pack_all<Dot>(runtime, problem.keys, p, width);

  const int64_t least = rows_worth_a_thread(problem);
  const Run runs = split_rows(runtime, problem.rows, least > 64 ? least : 64);
  const int64_t tile_rows = MOST_TILE_ROWS;
  const int64_t floats = Tile(problem, tile_rows, true).floats, sum_floats = p * Tile(problem, tile_rows, true).wide;
  float* scratch = allocate_floats(runtime, runs.count * floats);
  float* prompts_sums = gradients.prompts.data ? allocate_floats(runtime, runs.count * sum_floats) : nullptr;
  float* keys_sums = gradients.keys.data ? allocate_floats(runtime, runs.count * sum_floats) : nullptr;
  double* log_scales = static_cast<double*>(runtime.allocate(runtime.context, runs.count * sizeof(double)));

  parallel_for(runtime, runs.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile(problem, tile_rows, true, scratch + index * floats);
      keep_all(problem, tile.kept);
      BackwardRun run = shared;
      if (prompts_sums) run.prompts_sum = prompts_sums + index * sum_floats;
      if (keys_sums) run.keys_sum = keys_sums + index * sum_floats;
      const int64_t start = index * runs.rows, last = smaller(problem.rows, start + runs.rows);
      for (int64_t row = start; row < last; row += tile_rows)
        backward_tile<Dot>(problem, gradients, tile, row, smaller(tile_rows, last - row), row > start, run);
      log_scales[index] = run.log_scale;
    }
    finish_streams();
  });

  const int64_t stride = spread_stride(packed_columns(width));
  if (prompts_sums)
    write_sums(runtime, gradients.prompts, prompts_sums, runs.count, sum_floats, stride, p, width);
  if (keys_sums) write_sums(runtime, gradients.keys, keys_sums, runs.count, sum_floats, stride, p, width);
  if (gradients.log_scale) {
    double total = 0;
    for (int64_t index = 0; index < runs.count; ++index) total += log_scales[index];
    *gradients.log_scale = (float)total;
  }
}

// ---- The way in ----

#if defined(__AVX512BF16__)
bool in_bf16(const Call& problem) { return problem.source.dtype == Dtype::BFLOAT16; }
#endif

Call call_of(const PromptDiffusion& problem) {
  return {problem, expf(*problem.log_scale), problem.activation == DiffusionActivation::SOFTMAX,
          problem.row_weight == RowWeight::MAX};
}

void forward(const PromptDiffusion& given, const PromptDiffusionResults& results, const Runtime& runtime) {
  const Call problem = call_of(given);
  const Rows& output = results.output;
  if (problem.num_prompts <= FEW) return forward_few(problem, output, runtime);
#if defined(__AVX512BF16__)
  if (in_bf16(problem)) return forward_with<Bf16Pairs>(problem, output, runtime);
#endif
  forward_with<Fp32>(problem, output, runtime);
}

void backward(const PromptDiffusion& given, const PromptDiffusionGradients& gradients, const Runtime& runtime) {
  const Call problem = call_of(given);
#if defined(__AVX512BF16__)
  if (in_bf16(problem)) return backward_with<Bf16Pairs>(problem, gradients, runtime);
#endif
  backward_with<Fp32>(problem, gradients, runtime);
}

}  // namespace

extern const PromptDiffusionKernels<Runtime> prompt_diffusion{forward, backward};

}  // namespace fast_prompt::cpu::FAST_PROMPT_ISA
