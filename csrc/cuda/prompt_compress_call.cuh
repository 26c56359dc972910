// What both directions of prompt_compress make of a call: operands as stacks of matrices, products of these, and passes
// over the tokens. prompt_compress.cu says how the work is laid out.

#pragma once

#include <cmath>

#include "launch.cuh"
#include "prompt_compress_product.cuh"
#include "prompt_compress_tokens.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {

using namespace compress;
using T = element::FAST_PROMPT_ELEMENT;

// In prompt_compress_backward.cu.
const char* prompt_compress_backward(const PromptCompress&, const PromptCompressGradients&, const Runtime&);

namespace {

// ---- Layouts, and which one takes a call. The figures are reasoned, not yet measured on a GPU. ----

using Columns256 = TokenLayout<32>;
using Columns512 = TokenLayout<64>;
using Columns768 = TokenLayout<96>;
using Columns1024 = TokenLayout<128>;
// 1024 columns of float32 are more than the registers hold.
using Widest = std::conditional_t<sizeof(T) == 2, Columns1024, Columns768>;

using Plain = ProductLayout<0, 0>;
using ByDepth = ProductLayout<1, 0>;
using ByColumn = ProductLayout<0, 1>;

template <class Results>
struct Choice {
  int width;
  int64_t shared_bytes;
  void (*kernel)(TokenPass<T>, Results);
};

// The narrowest with the fewest groups of columns, of those whose shared memory this device has; every device of these
// chips has the first one's.
template <class Results, int COUNT>
const Choice<Results>& choose(const Choice<Results> (&choices)[COUNT], int64_t width, const Device& device) {
  const auto* chosen = choices;
  for (const auto& choice : choices)
    if (choice.shared_bytes <= device.shared_bytes && ceil_div(width, choice.width) < ceil_div(width, chosen->width))
      chosen = &choice;
  return *chosen;
}

unsigned blocks_of(int64_t elements, int64_t block) { return static_cast<unsigned>(ceil_div(elements, block)); }

}  // namespace

// Every operand is a stack of matrices, one for each head or each sample. What is only declared here is compiled with
// the forward, whose kernels the backward launches again.
class PromptCompressCall {
 public:
  PromptCompressCall(const PromptCompress& given, const Runtime& runtime)
      : given(given),
        runtime(runtime),
        device(runtime),
        launches(runtime.stream),
        rows(given.heads * given.queries),
        row_count(given.batch * rows),
        pitch(ceil_div(given.visual_width, 16) * 16),
        scale(1 / std::sqrt(static_cast<float>(given.head_width))) {}

  const char* forward(const PromptCompressResults& results);

 protected:
  const PromptCompress& given;
  const Runtime& runtime;
  const Device device;
  Launches launches;
  const int64_t rows, row_count;  // of a sample, of all
  const int64_t pitch;            // of the tokens' row operands
  const float scale;              // of scores

  template <class E>
  E* scratch(int64_t count) {
    return allocate<E>(runtime, count);
  }

  int64_t inner_width() const { return given.heads * given.head_width; }

  // ---- Stacks ----

  template <class E>
  static Stack<E> stack(const Matrix<E>& matrix, int64_t step) {
    const bool steps_align = step * static_cast<int64_t>(sizeof(E)) % PIECE_BYTES == 0;
    return {matrix, step, steps_align && is_aligned(matrix)};
  }

  // [batch * queries, head_width] for each head, of [batch, queries, heads * head_width].
  Stack<T> of_heads(const Rows& all) const { return stack(matrix<T>(all), given.head_width); }

  // [head_width, visual_width] for each head.
  template <class W>
  Stack<W> of_weight(const Rows& weight) const {
    return stack(matrix<W>(weight), given.head_width * weight.row_stride);
  }

  // [batch * queries, width] for each head, of [batch, sample_rows, width] whose first rows are [heads, queries].
  template <class E>
  Stack<E> of_rows(const E* data, int64_t width, int64_t sample_rows) const {
    return stack(Matrix<E>{data, given.queries, sample_rows * width, width}, given.queries * width);
  }

  template <class E>
  Stack<E> of_rows(const E* data, int64_t width) const {
    return of_rows(data, width, rows);
  }

  // ---- Products ----

  template <class L, class A, class B, class C>
  void product(int64_t count, int64_t result_rows, int64_t depth, int64_t columns, const Stack<A>& left,
               const Stack<B>& right, const Stack<C>& result, float factor = 1, const Stack<float>& row_scale = {},
               const Stack<float>& row_bias = {}, int64_t stored_columns = 0) {
    Product<A, B, C> all{};
    all.rows = result_rows;
    all.depth = depth;
    all.columns = static_cast<int>(columns);
    all.stored_columns = static_cast<int>(std::max(columns, stored_columns));
    all.left = left;
    all.right = right;
    all.result = result;
    all.scale = factor;
    all.row_scale = row_scale;
    all.row_bias = row_bias;
    if (row_bias.matrix.data) all.bias = data_of<const B>(given.value_bias);
    const int64_t tiles = ceil_div(result_rows, L::ROWS) * ceil_div(all.stored_columns, L::COLUMNS);
    launches.add(product_kernel<A, B, C, L>, blocks_of(count * tiles, 1), L::THREADS,
                 L::STAGES * L::template STAGE_BYTES<A, B>, all);
  }

  // The tokens' row operand: each head of the activations through its weight, [batch, operand_rows, pitch].
  void absorb(const Rows& activations, const Rows& weight, float factor, const float* sample_scale, T* operand,
              int64_t operand_rows);

  // Back from sums of tokens to the width of the activations: each head of the row values through its weight.
  void project(const float* row_values, const Rows& weight, const Rows& result, float factor,
               const float* weight_sums = nullptr);

  // ---- Passes over the tokens ----

  TokenPass<T> describe(const T* operand, int64_t operand_rows, int group_width) {
    TokenPass<T> pass{};
    const Matrix<T> visual = matrix<T>(given.visual);
    pass.visual = visual.data;
    pass.batch_stride = visual.batch_stride;
    pass.token_stride = visual.row_stride;
    pass.aligned = is_aligned(visual);
    pass.padding = given.padding;
    pass.operand = operand;
    pass.operand_stride = operand_rows * pitch;
    pass.operand_pitch = static_cast<int>(pitch);
    pass.batch = given.batch;
    pass.rows = static_cast<int>(rows);
    pass.tokens = static_cast<int>(given.tokens);
    pass.width = static_cast<int>(given.visual_width);
    pass.groups = static_cast<int>(ceil_div(given.visual_width, group_width));
    const int64_t tiles = ceil_div(given.tokens, TILE);
    const int64_t splits = std::clamp(device.multiprocessors / unsplit_blocks(pass), int64_t{1}, tiles);
    pass.split_tokens = static_cast<int>(ceil_div(tiles, splits)) * TILE;
    pass.splits = static_cast<int>(ceil_div(given.tokens, pass.split_tokens));
    pass.parts = scratch<float>(pass.splits * row_count * given.visual_width);
    pass.seed = given.dropout.seed;
    pass.dropout_threshold = given.dropout.threshold;
    pass.kept_scale = given.dropout.kept_scale;
    return pass;
  }

  template <class Results>
  void pass_over(const Choice<Results>& choice, const TokenPass<T>& pass, const Results& results) {
    launches.add(choice.kernel, blocks_of(pass.splits * unsplit_blocks(pass), 1), TOKEN_THREADS, choice.shared_bytes,
                 pass, results);
  }

  // Writes all results but the output; returns the weighted sums of tokens, kept or not.
  const float* attend(const T* keys, int64_t operand_rows, const PromptCompressKept& kept, float* weight_sums);

 private:
  int64_t unsplit_blocks(const TokenPass<T>& pass) const { return given.batch * ceil_div(rows, TILE) * pass.groups; }
};

}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
