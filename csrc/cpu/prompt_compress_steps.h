// The steps that prompt_compress's forward and backward have in common: see prompt_compress.cpp.

#pragma once

#include <math.h>

#include "gemm.h"
#include "parallel.h"
#include "philox.h"
#include "../prompt_compress.h"
#include "row_products.h"
#include "vector.h"

namespace fast_prompt::cpu::FAST_PROMPT_ISA {
namespace {

constexpr int64_t GROUP_QUERIES = 64;     // in a group of samples: enough to make good use of a head's weights
constexpr int64_t THREAD_WORK = 1 << 18;  // multiply-adds that are worth a thread

// Rows of words or of floats, one after another.
struct Matrix {
  float* data;
  int64_t stride;
  float* row(int64_t index) const { return data + index * stride; }
};

Matrix allocate_matrix(const Runtime& runtime, int64_t rows, int64_t words) {
  const int64_t stride = spread_stride(words);
  return {allocate_floats(runtime, rows * stride), stride};
}

// A thread's own memory.
struct Scratch {
  int64_t* places;       // of the sample's tokens that are no padding
  const float** rows;    // pointers to rows, of tokens or of a matrix
  Matrix tokens;         // copies of tokens that are not words
  float *kept, *packed;  // dropout's factors of a row; an operand laid out by columns
  Matrix results;        // a block of rows of unfold(); with a gradient of the tokens, that of a sample
};

// What the steps of a call share. The rows of a group are numbered (sample, head, query), its queries (sample, query).
struct Call {
  const PromptCompress& problem;
  const Runtime& runtime;
  float scale;             // 1 / sqrt(d_h)
  int64_t threads, group;  // samples in a full group
  Scratch* scratch;        // one a thread

  int64_t panels() const { return (problem.visual_width + PANEL - 1) / PANEL; }
  int64_t rows() const { return problem.heads * problem.queries; }  // of a sample
  int64_t row(int64_t query, int64_t head) const {
    return (query / problem.queries * problem.heads + head) * problem.queries + query % problem.queries;
  }
};

// Calls body(scratch, begin, end) for parts of [0, jobs), at most one a thread.
template <class Body>
void share(const Call& call, int64_t jobs, const Body& body) {
  const int64_t parts = smaller(call.threads, jobs);
  parallel_for(call.runtime, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      body(call.scratch[part], jobs * part / parts, jobs * (part + 1) / parts);
  });
}

// Whether rows can be multiplied where they are.
template <class Dot>
bool are_words(const Rows& rows, int64_t width) {
  return rows.dtype == (Dot::DEPTH == 1 ? Dtype::FLOAT32 : Dtype::BFLOAT16) && width % PANEL == 0;
}

// Pointers to `count` rows as words, copied only where they must be.
template <class Dot>
const float** rows_as_words(const Call& call, const Rows& rows, int64_t count, int64_t width) {
  const float** pointers = allocate<const float*>(call.runtime, count);
  const bool in_place = are_words<Dot>(rows, width);
  const Matrix copies = in_place ? Matrix{} : allocate_matrix(call.runtime, count, row_words<Dot>(width));
  share(call, count, [&](Scratch&, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pointers[i] = in_place ? (const float*)at(rows, i) : copies.row(i);
      if (!in_place) stage_row<Dot>(rows.dtype, at(rows, i), width, copies.row(i));
    }
  });
  return pointers;
}

template <class Dot>
Call prepare(const PromptCompress& problem, const Runtime& runtime, bool tokens_gradient = false) {
  const int64_t queries = problem.queries, tokens = problem.tokens, rows = problem.heads * queries;
  const int64_t work = problem.batch * rows * (tokens + problem.head_width) * problem.visual_width;
  const int64_t threads = smaller(runtime.threads, 1 + work / THREAD_WORK);
  const int64_t group = round_up((GROUP_QUERIES + queries - 1) / queries, threads);
  Call call{problem, runtime, 1.0f / sqrtf((float)problem.head_width), threads, smaller(group, problem.batch),
            allocate<Scratch>(runtime, threads)};
  const int64_t longest = round_up(tokens, LANES), queries_of_group = call.group * queries;
  const int64_t widest = problem.head_width > problem.visual_width ? problem.head_width : problem.visual_width;
  const int64_t result_width = row_words<Fp32>(tokens_gradient ? widest : problem.head_width);
  for (int64_t i = 0; i < threads; ++i) {
    Scratch& own = call.scratch[i];
    own.places = allocate<int64_t>(runtime, tokens);
    own.rows = allocate<const float*>(runtime, rows > tokens ? rows : tokens);
    const bool in_place = are_words<Dot>(problem.visual, problem.visual_width);
    own.tokens = in_place ? Matrix{} : allocate_matrix(runtime, tokens, row_words<Dot>(problem.visual_width));
    own.kept = allocate_floats(runtime, longest);
    for (int64_t c = 0; c < longest; c += LANES) store(own.kept + c, broadcast(1.0f));
    const int64_t by_head = queries_of_group * row_words<Fp32>(problem.head_width);
    own.packed = allocate_floats(runtime, by_head > rows * longest ? by_head : rows * longest);
    own.results = allocate_matrix(runtime, tokens_gradient && tokens > DOT_ROWS ? tokens : DOT_ROWS, result_width);
  }
  return call;
}

// ---- Products with weights: all queries of a group, head by head ----

// Queries [first, first + count) of Q or G as words, the part of each head filled up with zeros.
template <class Dot>
void stage_queries(const Call& call, const Rows& source, int64_t first, int64_t count, const Matrix& target) {
  const int64_t heads = call.problem.heads, width = call.problem.head_width;
  share(call, count, [&](Scratch&, int64_t begin, int64_t end) {
    for (int64_t query = begin; query < end; ++query)
      for (int64_t head = 0; head < heads; ++head)
        stage_row<Dot>(source.dtype, at(source, first + query, head * width), width,
                       target.row(query) + head * row_words<Dot>(width));
  });
}

// u = W_k^T q, dy = W_v^T g, as words for the products with tokens.
template <class TokenDot, class WeightDot>
void fold(const Call& call, const Matrix& queries, int64_t count, const float* const* weight, const Matrix& target) {
  const int64_t width = call.problem.head_width, panels = call.panels();
  share(call, call.problem.heads * panels, [&](Scratch&, int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t head = job / panels, panel = job % panels;
      const float* a = queries.data + head * row_words<WeightDot>(width);
      row_sums<WeightDot, TokenDot, Layout::ROWS>(
          {count, a, queries.stride, weight + head * width, width, false}, panel, panel + 1,
          [&](int64_t query) { return target.row(call.row(query, head)); });
    }
  });
}

// o = W_v y + b_v sum(w), dq = W_k du: queries [first, first + count) of the result. No bias where it is null.
template <class WeightDot>
void unfold(const Call& call, const Matrix& rows, int64_t first, int64_t count, const float* const* weight,
            const float* bias, const float* weight_sums, const Rows& target) {
  const int64_t width = call.problem.head_width, padded = row_words<Fp32>(width);
  const int64_t length = row_words<WeightDot>(call.problem.visual_width), blocks = (count + DOT_ROWS - 1) / DOT_ROWS;
  share(call, call.problem.heads * blocks, [&](Scratch& own, int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t head = job / blocks, query = job % blocks * DOT_ROWS, block = smaller(DOT_ROWS, count - query);
      row_dots<WeightDot>(
          block, [&](int64_t i) { return rows.row(call.row(query + i, head)); }, weight + head * width, width, length,
          own.results.data, own.results.stride);
      for (int64_t i = 0; i < block; ++i) {
        float* result = own.results.row(i);
        if (bias) {
          const float sum = weight_sums[call.row(query + i, head)];
          for (int64_t c = 0; c < width; c += LANES)
            store(result + c, load(result + c) + load(bias + head * padded + c) * sum);
        }
        with_storage(target.dtype, [&](auto storage) {
          write_row<decltype(storage)>(result, width, at(target, first + query + i, head * width));
        });
      }
    }
  });
}

// The group's rows of a matrix in the order (head, sample, query).
void list_by_head(const Call& call, const Matrix& rows, int64_t count, const float** pointers) {
  for (int64_t head = 0; head < call.problem.heads; ++head)
    for (int64_t query = 0; query < count; ++query) *pointers++ = rows.row(call.row(query, head));
}

// sums (+)= Q^T dU, G^T Y, for every head: [heads * head_width, visual_width].
template <class WeightDot>
void add_weight_gradient(const Call& call, const Matrix& queries, int64_t count, const float* const* rows_by_head,
                         bool accumulate, const Matrix& sums) {
  const int64_t width = call.problem.head_width, padded = row_words<Fp32>(width), panels = call.panels();
  share(call, call.problem.heads * panels, [&](Scratch& own, int64_t begin, int64_t end) {
    int64_t packed_head = -1;
    for (int64_t job = begin; job < end; ++job) {
      const int64_t head = job / panels, panel = job % panels;
      RowSums product{width, queries.data + head * row_words<WeightDot>(width), queries.stride,
                      rows_by_head + head * count, count, accumulate};
      if constexpr (WeightDot::DEPTH > 1) {
        const Rows operand{(char*)product.a, Dtype::BFLOAT16, count, 0, queries.stride * WeightDot::DEPTH};
        if (head != packed_head) pack<WeightDot>(operand, count, 0, padded, padded, own.packed);
        packed_head = head;
        product.a = own.packed;
        product.a_stride = padded;
      }
      row_sums<WeightDot, Fp32, Layout::COLUMNS>(product, panel, panel + 1,
                                                 [&](int64_t row) { return sums.row(head * width + row); });
    }
  });
}

// ---- Tokens of a sample that are no padding ----

bool is_padding(const PromptCompress& problem, int64_t sample, int64_t place) {
  const Padding& padding = problem.padding;
  return padding.data && padding.data[sample * padding.batch_stride + place * padding.token_stride];
}

// Their places, into own.places; returns how many.
int64_t list_tokens(const PromptCompress& problem, int64_t sample, const Scratch& own) {
  int64_t count = 0;
  for (int64_t place = 0; place < problem.tokens; ++place)
    if (!is_padding(problem, sample, place)) own.places[count++] = place;
  return count;
}

// Pointers to them as words, into own.rows; returns how many.
template <class Dot>
int64_t gather_tokens(const PromptCompress& problem, int64_t sample, const Scratch& own) {
  const int64_t count = list_tokens(problem, sample, own);
  for (int64_t i = 0; i < count; ++i) {
    const char* token = at(problem.visual, sample * problem.tokens + own.places[i]);
    own.rows[i] = own.tokens.data ? own.tokens.row(i) : (const float*)token;
    if (own.tokens.data) stage_row<Dot>(problem.visual.dtype, token, problem.visual_width, own.tokens.row(i));
  }
  return count;
}

// A row by place <-> a row by token. Padding's places get 0.
void spread_row(const PromptCompress& problem, const Scratch& own, int64_t count, const float* row, float* spread) {
  if (count < problem.tokens) memset(spread, 0, problem.tokens * sizeof(float));
  for (int64_t i = 0; i < count; ++i) spread[own.places[i]] = row[i];
}

void gather_row(const Scratch& own, int64_t count, const float* spread, float* row) {
  for (int64_t i = 0; i < count; ++i) row[i] = spread[own.places[i]];
}

// own.kept[i] for the tokens of a row: 0 or 1 / (1 - dropout_p); without dropout the ones written at first stay.
void draw_dropout(const PromptCompress& problem, const Scratch& own, int64_t row, int64_t count) {
  const uint64_t first = (uint64_t)row * problem.tokens;
  dropout_factors(problem.dropout, first, problem.tokens, own.kept);
  gather_row(own, count, own.kept, own.kept);
}

// ---- One row of scores: `count` numbers, filled up to a whole register ----

void fill_up(float* row, int64_t count, float value) {
  for (int64_t c = count; c < round_up(count, LANES); ++c) row[c] = value;
}

// s -> softmax(scale s) in place; returns the logarithm of the sum of exponentials.
float softmax(float* s, int64_t count, float scale) {
  if (count == 0) return -__builtin_inff();
  fill_up(s, count, -__builtin_inff());
  Floats largest = load(s), sum = {};
  for (int64_t c = LANES; c < count; c += LANES) largest = larger(largest, load(s + c));
  const float shift = largest_lane(largest);
  for (int64_t c = 0; c < count; c += LANES) {
    const Floats value = exp_of_nonpositive((load(s + c) - shift) * scale);
    store(s + c, value);
    sum += value;
  }
  const float total = sum_of_lanes(sum), factor = 1.0f / total;
  for (int64_t c = 0; c < count; c += LANES) store(s + c, load(s + c) * factor);
  return shift * scale + logf(total);
}

// a -> w; returns the sum of w.
float weigh(float* a, int64_t count, const float* kept) {
  Floats sum = {};
  for (int64_t c = 0; c < count; c += LANES) {
    const Floats w = load(a + c) * load(kept + c);
    store(a + c, w);
    sum += w;
  }
  return sum_of_lanes(sum);
}

// dw less what bias_grad adds to each of them -> ds.
void differentiate(const float* a, float* d, int64_t count, const float* kept, float bias_grad, float scale) {
  fill_up(d, count, 0.0f);
  Floats sum = {};
  for (int64_t c = 0; c < count; c += LANES) {
    const Floats da = (load(d + c) + bias_grad) * load(kept + c);
    store(d + c, da);
    sum += load(a + c) * da;
  }
  const float mean = sum_of_lanes(sum);
  for (int64_t c = 0; c < count; c += LANES) store(d + c, load(a + c) * (load(d + c) - mean) * scale);
}

// ---- Products with tokens: rows of one sample ----

// Rows [first, last) of a sample, `index` within its group.
struct Block {
  int64_t sample, first, rows;  // first: within the group
};

// Calls body(scratch, block) for every row of `samples` samples from `first` on. Where samples do not share out evenly
// among the threads, and are few, the rows of each do.
template <class Body>
void for_each_block(const Call& call, int64_t first, int64_t samples, const Body& body) {
  const bool whole = samples % call.threads == 0 || samples >= 8 * call.threads;
  const int64_t parts = whole ? 1 : call.threads;
  const int64_t length = round_up((call.rows() + parts - 1) / parts, DOT_ROWS);
  share(call, samples * parts, [&](Scratch& own, int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t index = job / parts, start = job % parts * length;
      const int64_t rows = smaller(length, call.rows() - start);
      if (rows > 0) body(own, Block{first + index, index * call.rows() + start, rows});
    }
  });
}

// C_r = A_r . x_i for the block's rows.
template <class Dot>
void dot_tokens(const Call& call, const Scratch& own, const Block& block, int64_t count, const Matrix& rows,
                const Matrix& results) {
  row_dots<Dot>(
      block.rows, [&](int64_t i) { return rows.row(block.first + i); }, own.rows, count,
      row_words<Dot>(call.problem.visual_width), results.row(block.first), results.stride);
}

// The block's rows of factors, floats, as words in their place.
template <class Dot>
void factors_as_words(const Block& block, int64_t count, const Matrix& factors) {
  if constexpr (Dot::DEPTH == 1) return;
  for (int64_t i = 0; i < block.rows; ++i) {
    float* row = factors.row(block.first + i);
    stage<Dot>(Dtype::FLOAT32, row, count, row);
  }
}

// C_r = sum of factor_ri x_i for the block's rows.
template <class Dot, class Out>
void sum_tokens(const Call& call, const Scratch& own, const Block& block, int64_t count, const Matrix& factors,
                const Matrix& results) {
  row_sums<Dot, Out, Layout::ROWS>({block.rows, factors.row(block.first), factors.stride, own.rows, count, false}, 0,
                                   call.panels(), [&](int64_t i) { return results.row(block.first + i); });
}

}  // namespace
}  // namespace fast_prompt::cpu::FAST_PROMPT_ISA
