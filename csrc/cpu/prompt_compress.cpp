// prompt_compress on the CPU, forward and backward: see ../prompt_compress.h for what it computes.
//
// With a row for each sample, head and query, and X the sample's tokens, both passes are a few products a row, all of
// whose operands are used where they lie (row_products.h):
//
//   forward   u = W_k^T q          s = X u, a = softmax(s / sqrt(d_h))    y = X^T w       o = W_v y + b_v sum(w)
//   backward  dy = W_v^T g         dw = X dy + g.b_v, ds                  du = X^T ds     dq = W_k du
//             dW_k += q (x) du     dW_v += g (x) y                        dX = w (x) dy + ds (x) u
//
// Samples go in groups. The products with weights take all rows of a group, one head after another, so that a head's
// weights are in the cache for them; the products with tokens take all rows of one sample, so that its tokens come
// from memory once and from the cache the second time. Padding tokens have no pointer and are never read. Every sum
// is added up by one thread, in one order: no bit depends on the number of threads.
//
// On a machine with bf16 dot products, bf16 tokens and bf16 weights are multiplied as they are, and what multiplies
// them is rounded to bf16; everything else is widened to float32. The sums are float32 in all cases.

#include "../prompt_compress.h"

#include "prompt_compress_steps.h"

namespace fast_prompt::cpu::FAST_PROMPT_ISA {
namespace {

// ---- Forward ----

// The memory of a group in a forward.
struct Forward {
  Matrix queries, folded, weights, attended;  // Q; u, w (s before), y
  float* weight_sums;
};

template <class TokenDot, class WeightDot>
void attend(const Call& call, const Forward& group, const PromptCompressKept& kept, const Scratch& own,
            const Block& block) {
  const PromptCompress& problem = call.problem;
  const int64_t count = gather_tokens<TokenDot>(problem, block.sample, own), width = problem.visual_width;
  // Of the block's first row, in the whole call.
  const int64_t first = block.sample * call.rows() + block.first % call.rows();
  dot_tokens<TokenDot>(call, own, block, count, group.folded, group.weights);
  for (int64_t i = 0; i < block.rows; ++i) {
    float* row = group.weights.row(block.first + i);
    kept.logsumexp[first + i] = softmax(row, count, call.scale);
    if (kept.probabilities)
      spread_row(problem, own, count, row, kept.probabilities + (first + i) * problem.tokens);
    draw_dropout(problem, own, first + i, count);
    group.weight_sums[block.first + i] = weigh(row, count, own.kept);
  }
  factors_as_words<TokenDot>(block, count, group.weights);
  sum_tokens<TokenDot, WeightDot>(call, own, block, count, group.weights, group.attended);
  if (!kept.attended) return;
  typedef typename WeightDot::Storage Storage;
  for (int64_t i = 0; i < block.rows; ++i)
    for_each_vector<Float32>(width, [&](int64_t c, auto, auto store_row) {
      const auto* row = (const typename Storage::Element*)group.attended.row(block.first + i);
      store_row(kept.attended + (first + i) * width, Storage::load(row + c));
    });
}

// b_v as floats, each head's part filled up with zeros; null where there is none.
const float* stage_bias(const PromptCompress& problem, const Runtime& runtime) {
  if (!problem.value_bias.data) return nullptr;
  const int64_t width = problem.head_width, padded = row_words<Fp32>(width);
  float* bias = allocate_floats(runtime, problem.heads * padded);
  for (int64_t head = 0; head < problem.heads; ++head)
    stage_row<Fp32>(problem.value_bias.dtype, at(problem.value_bias, 0, head * width), width, bias + head * padded);
  return bias;
}

template <class TokenDot, class WeightDot>
void forward_with(const PromptCompress& problem, const PromptCompressKept& kept, const Rows& output,
                  const Runtime& runtime) {
  const Call call = prepare<TokenDot>(problem, runtime);
  const int64_t weight_rows = problem.heads * problem.head_width, rows = call.group * call.rows();
  const float** key_weight = rows_as_words<WeightDot>(call, problem.key_weight, weight_rows, problem.visual_width);
  const float** value_weight = rows_as_words<WeightDot>(call, problem.value_weight, weight_rows, problem.visual_width);
  const float* bias = stage_bias(problem, runtime);
  const Forward group{
      allocate_matrix(runtime, call.group * problem.queries, problem.heads * row_words<WeightDot>(problem.head_width)),
      allocate_matrix(runtime, rows, row_words<TokenDot>(problem.visual_width)),
      allocate_matrix(runtime, rows, round_up(problem.tokens, LANES)),
      allocate_matrix(runtime, rows, row_words<WeightDot>(problem.visual_width)),
      allocate_floats(runtime, rows),
  };
  for (int64_t sample = 0; sample < problem.batch; sample += call.group) {
    const int64_t samples = smaller(call.group, problem.batch - sample);
    const int64_t first = sample * problem.queries, count = samples * problem.queries;
    stage_queries<WeightDot>(call, problem.query, first, count, group.queries);
    fold<TokenDot, WeightDot>(call, group.queries, count, key_weight, group.folded);
    for_each_block(call, sample, samples, [&](Scratch& own, const Block& block) {
      attend<TokenDot, WeightDot>(call, group, kept, own, block);
    });
    unfold<WeightDot>(call, group.attended, first, count, value_weight, bias, group.weight_sums, output);
  }
}

// ---- Backward ----

// The memory of a group in a backward; what no gradient needs is null.
struct Backward {
  Matrix queries, grads, float_grads;  // Q; G, as words and as floats
  Matrix folded, attended;             // u, y
  Matrix folded_grads, attended_grads; // du, dy
  Matrix weights, score_grads;         // w (s before), ds (dw before)
  float* weight_sums;
  const float** by_head;  // pointers to rows
  const float* bias;
};

// What must be computed for the gradients that are wanted.
struct Needs {
  bool score_grads, folded_grads, folded, attended, weights;
};

Needs needs_of(const PromptCompressKept& kept, const PromptCompressGradients& gradients) {
  Needs needs{};
  needs.folded_grads = gradients.query.data || gradients.key_weight.data;
  needs.score_grads = needs.folded_grads || gradients.visual.data;
  needs.attended = gradients.value_weight.data && !kept.attended;
  needs.weights = needs.score_grads || needs.attended || gradients.value_bias.data;
  needs.folded = gradients.visual.data || (needs.weights && !kept.probabilities);
  return needs;
}

// g.b_v of a row.
float bias_gradient(const Call& call, const Backward& group, int64_t row) {
  if (!group.bias) return 0.0f;
  const int64_t queries = call.problem.queries, padded = row_words<Fp32>(call.problem.head_width);
  const int64_t head = row / queries % call.problem.heads, query = row / call.rows() * queries + row % queries;
  const float *grad = group.float_grads.row(query) + head * padded, *bias = group.bias + head * padded;
  Floats sum = {};
  for (int64_t c = 0; c < padded; c += LANES) sum += load(grad + c) * load(bias + c);
  return sum_of_lanes(sum);
}

template <class TokenDot, class WeightDot>
void attend_backward(const Call& call, const Backward& group, const Needs& needs, const PromptCompressKept& kept,
                     const Scratch& own, const Block& block) {
  const PromptCompress& problem = call.problem;
  const int64_t count = gather_tokens<TokenDot>(problem, block.sample, own);
  const int64_t first = block.sample * call.rows() + block.first % call.rows();
  if (!kept.probabilities) dot_tokens<TokenDot>(call, own, block, count, group.folded, group.weights);
  if (needs.score_grads) dot_tokens<TokenDot>(call, own, block, count, group.attended_grads, group.score_grads);
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t index = block.first + i;
    float* row = group.weights.row(index);
    if (kept.probabilities) {
      gather_row(own, count, kept.probabilities + (first + i) * problem.tokens, row);
      fill_up(row, count, 0.0f);
    } else {
      softmax(row, count, call.scale);
    }
    draw_dropout(problem, own, first + i, count);
    if (needs.score_grads)
      differentiate(row, group.score_grads.row(index), count, own.kept, bias_gradient(call, group, index), call.scale);
    group.weight_sums[index] = weigh(row, count, own.kept);
  }
  factors_as_words<TokenDot>(block, count, group.weights);
  if (needs.score_grads) factors_as_words<TokenDot>(block, count, group.score_grads);
  if (needs.attended) sum_tokens<TokenDot, WeightDot>(call, own, block, count, group.weights, group.attended);
  if (needs.folded_grads)
    sum_tokens<TokenDot, WeightDot>(call, own, block, count, group.score_grads, group.folded_grads);
}

// db_v += sum over rows of g sum(w): [heads, head_width], filled up with zeros.
void add_bias_gradient(const Call& call, const Backward& group, int64_t count, bool accumulate, float* sums) {
  const int64_t padded = row_words<Fp32>(call.problem.head_width);
  share(call, call.problem.heads, [&](Scratch&, int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head)
      for (int64_t c = 0; c < padded; c += LANES) {
        Floats sum = accumulate ? load(sums + head * padded + c) : Floats{};
        for (int64_t query = 0; query < count; ++query)
          sum += load(group.float_grads.row(query) + head * padded + c) * group.weight_sums[call.row(query, head)];
        store(sums + head * padded + c, sum);
      }
  });
}

// dX_i (+)= sum over the sample's rows r of factor_ri C_r, for tokens [first, last) of those that are no padding.
template <class Dot, class ResultOf>
void sum_rows(const Call& call, const Scratch& own, int64_t first, int64_t last, const Matrix& factors,
              const Matrix& rows, bool accumulate, ResultOf result_of) {
  for (int64_t r = 0; r < call.rows(); ++r) own.rows[r] = rows.row(r);
  RowSums product{last - first, factors.data + first, factors.stride, own.rows, call.rows(), accumulate};
  if constexpr (Dot::DEPTH > 1) {
    const Rows operand{(char*)((uint16_t*)factors.data + first), Dtype::BFLOAT16, call.rows(), 0,
                       factors.stride * Dot::DEPTH};
    product.a = own.packed;
    product.a_stride = round_up(last - first, LANES);
    pack<Dot>(operand, call.rows(), 0, product.a_stride, last - first, own.packed);
  }
  row_sums<Dot, Fp32, Layout::COLUMNS>(product, 0, call.panels(), result_of);
}

template <class Dot>
void write_tokens_gradient(const Call& call, const Backward& group, int64_t first, int64_t samples,
                           const Rows& target) {
  const PromptCompress& problem = call.problem;
  const int64_t tokens = problem.tokens, width = problem.visual_width, parts = samples < call.threads ? call.threads : 1;
  const bool in_place = are_words<Fp32>(target, width);
  share(call, samples * parts, [&](Scratch& own, int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; ++job) {
      const int64_t index = job / parts, sample = first + index, part = job % parts;
      const int64_t count = list_tokens(problem, sample, own);
      const int64_t start = count * part / parts, stop = count * (part + 1) / parts;
      const auto target_of = [&](int64_t i) { return at(target, sample * tokens + own.places[start + i]); };
      const auto result_of = [&](int64_t i) { return in_place ? (float*)target_of(i) : own.results.row(i); };
      const auto of_sample = [&](const Matrix& matrix) {
        return Matrix{matrix.row(index * call.rows()), matrix.stride};
      };
      sum_rows<Dot>(call, own, start, stop, of_sample(group.weights), of_sample(group.attended_grads), false,
                    result_of);
      sum_rows<Dot>(call, own, start, stop, of_sample(group.score_grads), of_sample(group.folded), true, result_of);
      with_storage(target.dtype, [&](auto storage) {
        typedef decltype(storage) Storage;
        for (int64_t i = 0; i < stop - start && !in_place; ++i)
          write_row<Storage>(own.results.row(i), width, target_of(i));
        for (int64_t place = tokens * part / parts; place < tokens * (part + 1) / parts && count < tokens; ++place)
          if (is_padding(problem, sample, place))
            memset(at(target, sample * tokens + place), 0, width * sizeof(typename Storage::Element));
      });
    }
  });
}

// Where a weight's gradient is added up: in its place where that holds floats enough.
Matrix sums_for(const Call& call, const Rows& target) {
  const int64_t width = call.problem.visual_width, rows = call.problem.heads * call.problem.head_width;
  if (!target.data) return {};
  if (are_words<Fp32>(target, width)) return {(float*)target.data, target.row_stride};
  return allocate_matrix(call.runtime, rows, row_words<Fp32>(width));
}

void write_sums(const Call& call, const Matrix& sums, const Rows& target) {
  if (!target.data || (char*)sums.data == target.data) return;
  share(call, call.problem.heads * call.problem.head_width, [&](Scratch&, int64_t begin, int64_t end) {
    with_storage(target.dtype, [&](auto storage) {
      for (int64_t row = begin; row < end; ++row)
        write_row<decltype(storage)>(sums.row(row), call.problem.visual_width, at(target, row));
    });
  });
}

void write_bias_sums(const PromptCompress& problem, const float* sums, const Rows& target) {
  with_storage(target.dtype, [&](auto storage) {
    for (int64_t head = 0; head < problem.heads; ++head)
      write_row<decltype(storage)>(sums + head * row_words<Fp32>(problem.head_width), problem.head_width,
                                   at(target, 0, head * problem.head_width));
  });
}

template <class TokenDot, class WeightDot>
Backward allocate_backward(const Call& call, const Needs& needs, const PromptCompressGradients& gradients) {
  const PromptCompress& problem = call.problem;
  const int64_t rows = call.group * call.rows(), queries = call.group * problem.queries;
  const auto matrix = [&](bool needed, int64_t count, int64_t words) {
    return needed ? allocate_matrix(call.runtime, count, words) : Matrix{};
  };
  const int64_t query_words = problem.heads * row_words<WeightDot>(problem.head_width);
  const int64_t token_words = row_words<TokenDot>(problem.visual_width);
  const int64_t weight_words = row_words<WeightDot>(problem.visual_width);
  const int64_t tokens = round_up(problem.tokens, LANES);
  Backward group{};
  group.queries = matrix(needs.folded || gradients.key_weight.data, queries, query_words);
  group.grads = matrix(needs.score_grads || gradients.value_weight.data, queries, query_words);
  group.float_grads = matrix(problem.value_bias.data, queries, problem.heads * row_words<Fp32>(problem.head_width));
  group.folded = matrix(needs.folded, rows, token_words);
  group.attended = matrix(gradients.value_weight.data, rows, weight_words);
  group.folded_grads = matrix(needs.folded_grads, rows, weight_words);
  group.attended_grads = matrix(needs.score_grads, rows, token_words);
  group.weights = matrix(needs.weights, rows, tokens);
  group.score_grads = matrix(needs.score_grads, rows, tokens);
  group.weight_sums = allocate_floats(call.runtime, rows);
  group.by_head = allocate<const float*>(call.runtime, rows);
  group.bias = stage_bias(problem, call.runtime);
  return group;
}

// y of a group's rows, as the forward kept them.
template <class Dot>
void stage_attended(const Call& call, const float* kept, int64_t rows, const Matrix& target) {
  const int64_t width = call.problem.visual_width;
  share(call, rows, [&](Scratch&, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      stage_row<Dot>(Dtype::FLOAT32, kept + row * width, width, target.row(row));
  });
}

template <class TokenDot, class WeightDot>
void backward_with(const PromptCompress& problem, const PromptCompressKept& kept,
                   const PromptCompressGradients& gradients, const Runtime& runtime) {
  const int64_t width = problem.visual_width, weight_rows = problem.heads * problem.head_width;
  const Needs needs = needs_of(kept, gradients);
  const bool tokens_gradient = gradients.visual.data && !are_words<Fp32>(gradients.visual, width);
  const Call call = prepare<TokenDot>(problem, runtime, tokens_gradient);
  const Backward group = allocate_backward<TokenDot, WeightDot>(call, needs, gradients);
  const float **key_weight = nullptr, **value_weight = nullptr;
  if (needs.folded || gradients.query.data)
    key_weight = rows_as_words<WeightDot>(call, problem.key_weight, weight_rows, width);
  if (needs.score_grads) value_weight = rows_as_words<WeightDot>(call, problem.value_weight, weight_rows, width);
  const Matrix key_sums = sums_for(call, gradients.key_weight), value_sums = sums_for(call, gradients.value_weight);
  float* bias_sums = allocate_floats(runtime, problem.heads * row_words<Fp32>(problem.head_width));

  for (int64_t sample = 0; sample < problem.batch; sample += call.group) {
    const int64_t samples = smaller(call.group, problem.batch - sample);
    const int64_t first = sample * problem.queries, count = samples * problem.queries;
    const auto weight_gradient = [&](const Matrix& queries, const Matrix& rows, const Matrix& sums) {
      list_by_head(call, rows, count, group.by_head);
      add_weight_gradient<WeightDot>(call, queries, count, group.by_head, sample > 0, sums);
    };
    if (group.queries.data) stage_queries<WeightDot>(call, problem.query, first, count, group.queries);
    if (group.grads.data) stage_queries<WeightDot>(call, gradients.grad, first, count, group.grads);
    if (group.float_grads.data) stage_queries<Fp32>(call, gradients.grad, first, count, group.float_grads);
    if (needs.folded) fold<TokenDot, WeightDot>(call, group.queries, count, key_weight, group.folded);
    if (needs.score_grads) fold<TokenDot, WeightDot>(call, group.grads, count, value_weight, group.attended_grads);
    if (needs.weights)
      for_each_block(call, sample, samples, [&](Scratch& own, const Block& block) {
        attend_backward<TokenDot, WeightDot>(call, group, needs, kept, own, block);
      });
    if (gradients.value_weight.data && kept.attended)
      stage_attended<WeightDot>(call, kept.attended + sample * call.rows() * width, samples * call.rows(),
                                group.attended);
    if (gradients.query.data)
      unfold<WeightDot>(call, group.folded_grads, first, count, key_weight, nullptr, nullptr, gradients.query);
    if (gradients.key_weight.data) weight_gradient(group.queries, group.folded_grads, key_sums);
    if (gradients.value_weight.data) weight_gradient(group.grads, group.attended, value_sums);
    if (gradients.value_bias.data) add_bias_gradient(call, group, count, sample > 0, bias_sums);
    if (gradients.visual.data) write_tokens_gradient<TokenDot>(call, group, sample, samples, gradients.visual);
  }
  write_sums(call, key_sums, gradients.key_weight);
  write_sums(call, value_sums, gradients.value_weight);
  if (gradients.value_bias.data) write_bias_sums(problem, bias_sums, gradients.value_bias);
}

// ---- The way in ----

// Calls action with how tokens and how weights are multiplied.
template <class Action>
void with_dots([[maybe_unused]] const PromptCompress& problem, Action action) {
#if defined(__AVX512BF16__)
  const bool weights_too = problem.key_weight.dtype == Dtype::BFLOAT16;
  if (problem.visual.dtype == Dtype::BFLOAT16)
    return weights_too ? action(Bf16Pairs{}, Bf16Pairs{}) : action(Bf16Pairs{}, Fp32{});
#endif
  action(Fp32{}, Fp32{});
}

void forward(const PromptCompress& problem, const PromptCompressResults& results, const Runtime& runtime) {
  with_dots(problem, [&](auto tokens, auto weights) {
    forward_with<decltype(tokens), decltype(weights)>(problem, results.kept, results.output, runtime);
  });
}

void backward(const PromptCompress& problem, const PromptCompressGradients& gradients, const Runtime& runtime) {
  with_dots(problem, [&](auto tokens, auto weights) {
    backward_with<decltype(tokens), decltype(weights)>(problem, gradients.kept, gradients, runtime);
  });
}

}  // namespace

extern const PromptCompressKernels<Runtime> prompt_compress{forward, backward};

}  // namespace fast_prompt::cpu::FAST_PROMPT_ISA
