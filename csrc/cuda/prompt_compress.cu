// prompt_compress on CUDA GPUs, sm_80 and up: see prompt_compress.h for what it computes. Not yet run on a GPU.
//
// In a sample every head of every query is a row: u = W_k^T q / sqrt(d_h) has scores u X^T with the tokens X, and takes
// their weighted sum y = w X, whose o = W_v y + b_v sum(w) is the result. No token is projected.
//
// What it costs, for e.g. a batch of 64, 197 tokens of 768 in bf16, one query and 12 heads, on an H100 with 3.0 TB/s:
//   tokens    19.4 MB, 6.5 us, read once; 64 operations an element, 0.6 GFLOP, on tensor cores. Memory is the floor.
//   the rest  W_k and W_v, 1.2 MB each; u 1.2 MB and y 2.4 MB a split, which stay in L2.
//
// Forward, four kernels: u by product_kernel; the tokens by attend_kernel; its splits made one by combine_kernel; and o
// by product_kernel again. A block of attend_kernel takes 16 rows of a sample (12 heads of one query fit) and goes over
// a split of its tokens, 16 at a time, as flash attention does: the tile of tokens is in shared memory for both
// products. Its 8 warps share the tile out by columns. A warp then has its columns of u and of y in registers, reads
// its slice of the tile alone, and so loads it alone (a ring of cp.async stages that needs no barrier); what warps
// exchange are the parts of the 16 x 16 scores, of which every thread adds up one, to do with it all that a softmax
// asks.
//
// Columns beyond what 8 warps hold make groups: a block computes the scores from all of them, and y for its own group,
// whose tile comes last. So tokens wider than 1024 (768 in fp32; less on chips with little shared memory) are read once
// for each group, mostly from L2.
//
// Samples too few for the chip are split until each multiprocessor has a block: two stages of 24 KB under way are more
// than enough for its part of the memory's speed, and every further split costs another y of each row. Splits are added
// up in order, so that the same call on the same card gives the same bits.
//
// Backward: dY = W_v^T g by product_kernel, in the place of u; with it derive_kernel, the same pass over the tokens,
// has the derivatives of the probabilities for scores and dU = dS X for result. What softmax needs of the whole row,
// the mean of those derivatives, is dY.y + g.b_v sum(w), so that one pass is enough (moments_kernel, before it). Where
// the forward kept no probabilities or no y, it runs again into scratch memory. dX, if it is wanted at all, is [w;
// dS]^T [dY; U], a product again, as are dq, dW_k, dW_v and db_v.
//
// float32 multiplies as three TF32 products (tile.cuh), as do the products that have float32 on one side.
//
// Compiled once per type of the activations, FAST_PROMPT_ELEMENT: float32, bfloat16 or float16.

#include "prompt_compress.h"

#include <cmath>

#include "launch.cuh"
#include "prompt_compress_product.cuh"
#include "prompt_compress_rows.cuh"
#include "prompt_compress_tokens.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {
namespace {

using T = element::FAST_PROMPT_ELEMENT;

// ---- Layouts, and which one takes a call. The figures are reasoned, not yet measured on a GPU. ----

using Columns256 = TokenLayout<32>;
using Columns512 = TokenLayout<64>;
using Columns768 = TokenLayout<96>;
using Columns1024 = TokenLayout<128>;

using Plain = ProductLayout<0, 0>;
using ByDepth = ProductLayout<1, 0>;
using ByColumn = ProductLayout<0, 1>;

struct Choice {
  int width;
  int64_t shared_bytes;
  void (*attend)(TokenPass<T>, SoftmaxResults);
  void (*derive)(TokenPass<T>, Derivatives<T>);
};

template <class L>
constexpr Choice CHOICE = {L::WIDTH, L::template shared_bytes<T>(), attend_kernel<T, L>, derive_kernel<T, L>};

// 1024 columns of float32 are more than the registers hold.
constexpr Choice CHOICES[] = {CHOICE<Columns256>, CHOICE<Columns512>, CHOICE<Columns768>,
                              CHOICE<std::conditional_t<sizeof(T) == 2, Columns1024, Columns768>>};

// The narrowest with the fewest groups of columns, of those whose shared memory this device has; every device of these
// chips has the first one's.
const Choice& choose(int64_t width, const Device& device) {
  const Choice* chosen = CHOICES;
  for (const Choice& choice : CHOICES)
    if (choice.shared_bytes <= device.shared_bytes && ceil_div(width, choice.width) < ceil_div(width, chosen->width))
      chosen = &choice;
  return *chosen;
}

// ---- A call ----

unsigned blocks_of(int64_t elements, int64_t block) { return static_cast<unsigned>(ceil_div(elements, block)); }

// The weights' type is W; every operand is a stack of matrices, one for each head or each sample.
template <class W>
class Call {
  const PromptCompress& given;
  const Runtime& runtime;
  const Device device;
  Launches launches;
  const int64_t rows, row_count;  // of a sample, of all
  const int64_t pitch;            // of the tokens' row operands
  const float scale;              // of scores
  const Choice& choice;

 public:
  Call(const PromptCompress& given, const Runtime& runtime)
      : given(given),
        runtime(runtime),
        launches(runtime.stream),
        rows(given.heads * given.queries),
        row_count(given.batch * rows),
        pitch(ceil_div(given.visual_width, 16) * 16),
        scale(1 / std::sqrt(static_cast<float>(given.head_width))),
        choice(choose(given.visual_width, device)) {}

  const char* forward(const PromptCompressResults& results) {
    T* const keys = scratch<T>(row_count * pitch);
    absorb(given.query, given.key_weight, scale, nullptr, keys, rows);
    float* const weight_sums = scratch<float>(row_count);
    const float* attended = attend(keys, rows, results, weight_sums);
    const bool biased = given.value_bias != nullptr;
    const Stack<float> row_bias = biased ? of_rows(weight_sums, 1) : Stack<float>{};
    product<ByColumn>(given.heads, given.batch * given.queries, given.visual_width, given.head_width,
                      of_rows(attended, given.visual_width), of_weight(given.value_weight),
                      of_heads(contiguous_rows(results.output)), 1, {}, row_bias);
    return launches.error();
  }

  const char* backward(const PromptCompressGradients& gradients) {
    // In each sample dY, and after it, for the tokens' gradient, U.
    const bool wide = gradients.visual != nullptr;
    const int64_t operand_rows = wide ? 2 * rows : rows;
    T* const derivatives = scratch<T>(given.batch * operand_rows * pitch);
    T* const keys = wide ? derivatives + rows * pitch : nullptr;
    const auto kept = what_was_kept(gradients, keys, operand_rows);
    float* const units = scratch<float>(2 * given.batch);
    float* const per_units = units + given.batch;
    launches.add(units_kernel<T>, blocks_of(given.batch, 1), ROW_THREADS, ROW_THREADS / 32 * sizeof(float),
                 matrix<T>(gradients.grad), given.queries, static_cast<int>(inner_width()), units, per_units);
    absorb(gradients.grad, given.value_weight, 1, per_units, derivatives, operand_rows);
    TokenPass<T> pass = describe(derivatives, operand_rows);
    const MomentsOf<T, W> of{matrix<T>(gradients.grad),
                             static_cast<const W*>(given.value_bias),
                             per_units,
                             static_cast<int>(given.heads),
                             static_cast<int>(given.head_width),
                             static_cast<int>(given.queries),
                             kept.probabilities,
                             kept.attended,
                             scratch<float>(row_count),
                             scratch<RowMoments>(row_count)};
    launches.add(moments_kernel<T, W>, blocks_of(row_count, ROW_THREADS / 32), ROW_THREADS, 0, pass, of);
    if (gradients.query || gradients.key_weight || wide) differentiate_scores(gradients, pass, kept, of, units);
    if (gradients.value_weight) weight_gradient(gradients.grad, kept.attended, 1, gradients.value_weight);
    if (gradients.value_bias)
      product<ByDepth>(given.heads, given.head_width, given.batch * given.queries, 1, of_heads(gradients.grad),
                       of_rows(of.weight_sums, 1),
                       stack(contiguous(static_cast<W*>(gradients.value_bias), given.head_width, 1), given.head_width));
    return launches.error();
  }

 private:
  struct Kept {
    const float *probabilities, *attended;
  };

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

  Rows contiguous_rows(void* data) const { return {data, given.batch * given.queries, 0, inner_width()}; }

  // [head_width, visual_width] for each head.
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
    if (row_bias.matrix.data) all.bias = static_cast<const B*>(given.value_bias);
    const int64_t tiles = ceil_div(result_rows, L::ROWS) * ceil_div(all.stored_columns, L::COLUMNS);
    launches.add(product_kernel<A, B, C, L>, blocks_of(count * tiles, 1), L::THREADS,
                 L::STAGES * L::template STAGE_BYTES<A, B>, all);
  }

  // The tokens' row operand: each head of the activations through its weight, [batch, operand_rows, pitch].
  void absorb(const Rows& activations, const Rows& weight, float factor, const float* sample_scale, T* operand,
              int64_t operand_rows) {
    const Stack<float> row_scale{{sample_scale, given.queries, 1, 0}, 0, false};
    product<Plain>(given.heads, given.batch * given.queries, given.head_width, given.visual_width,
                   of_heads(activations), of_weight(weight), of_rows(operand, pitch, operand_rows), factor, row_scale,
                   {}, pitch);
  }

  // [heads * head_width, visual_width] = sum over samples and queries of activations (x) row_values.
  void weight_gradient(const Rows& activations, const float* row_values, float factor, void* gradient) {
    const auto result = contiguous(static_cast<W*>(gradient), given.head_width, given.visual_width);
    product<ByDepth>(given.heads, given.head_width, given.batch * given.queries, given.visual_width,
                     of_heads(activations), of_rows(row_values, given.visual_width),
                     stack(result, given.head_width * given.visual_width), factor);
  }

  // ---- Passes over the tokens ----

  TokenPass<T> describe(const T* operand, int64_t operand_rows) {
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
    pass.groups = static_cast<int>(ceil_div(given.visual_width, choice.width));
    const int64_t tiles = ceil_div(given.tokens, TILE);
    const int64_t splits = std::clamp(device.multiprocessors / unsplit_blocks(pass), int64_t{1}, tiles);
    pass.split_tokens = static_cast<int>(ceil_div(tiles, splits)) * TILE;
    pass.splits = static_cast<int>(ceil_div(given.tokens, pass.split_tokens));
    pass.parts = scratch<float>(pass.splits * row_count * given.visual_width);
    pass.seed = given.seed;
    pass.dropout_threshold = given.dropout_threshold;
    pass.kept_scale = given.kept_scale;
    return pass;
  }

  int64_t unsplit_blocks(const TokenPass<T>& pass) const { return given.batch * ceil_div(rows, TILE) * pass.groups; }

  // Writes all results but the output; returns the weighted sums of tokens, kept or not.
  const float* attend(const T* keys, int64_t operand_rows, const PromptCompressResults& results, float* weight_sums) {
    TokenPass<T> pass = describe(keys, operand_rows);
    const SoftmaxResults found{results.probabilities, scratch<RowSums>(pass.splits * row_count)};
    float* const attended = results.attended ? results.attended : scratch<float>(row_count * given.visual_width);
    launches.add(choice.attend, blocks_of(pass.splits * unsplit_blocks(pass), 1), TOKEN_THREADS, choice.shared_bytes,
                 pass, found);
    const Combination all{pass.parts, found.sums, row_count, pass.splits, pass.tokens, pass.width, given.kept_scale};
    launches.add(combine_kernel, blocks_of(row_count, 1), ROW_THREADS, 0, all, attended, results.logsumexp, weight_sums,
                 results.probabilities);
    return attended;
  }

  // What the forward kept, or the forward again; and U in `keys`, where there is room for it.
  Kept what_was_kept(const PromptCompressGradients& gradients, T* keys, int64_t operand_rows) {
    const bool all_kept = gradients.probabilities && gradients.attended;
    if (!keys && !all_kept) {
      keys = scratch<T>(row_count * pitch);
      operand_rows = rows;
    }
    if (keys) absorb(given.query, given.key_weight, scale, nullptr, keys, operand_rows);
    if (all_kept) return {gradients.probabilities, gradients.attended};
    const PromptCompressResults again{nullptr, scratch<float>(row_count), scratch<float>(row_count * given.tokens),
                                      scratch<float>(row_count * given.visual_width)};
    attend(keys, operand_rows, again, scratch<float>(row_count));
    return {again.probabilities, again.attended};
  }

  // The gradients that come of the scores: those of query, key_weight and visual.
  void differentiate_scores(const PromptCompressGradients& gradients, const TokenPass<T>& pass, const Kept& kept,
                            const MomentsOf<T, W>& of, const float* units) {
    const int coefficient_pitch = static_cast<int>(ceil_div(given.tokens, 8) * 8);
    Derivatives<T> derivatives{kept.probabilities, of.moments, nullptr, coefficient_pitch};
    if (gradients.visual) derivatives.coefficients = scratch<T>(2 * row_count * derivatives.coefficient_pitch);
    launches.add(choice.derive, blocks_of(pass.splits * unsplit_blocks(pass), 1), TOKEN_THREADS, choice.shared_bytes,
                 pass, derivatives);
    float* const key_gradient = scratch<float>(row_count * given.visual_width);
    launches.add(sum_splits_kernel, blocks_of(row_count * given.visual_width, ROW_THREADS), ROW_THREADS, 0, pass.parts,
                 pass.splits, given.batch, rows * given.visual_width, units, key_gradient);
    if (gradients.query)
      product<ByColumn>(given.heads, given.batch * given.queries, given.visual_width, given.head_width,
                        of_rows(key_gradient, given.visual_width), of_weight(given.key_weight),
                        of_heads(contiguous_rows(gradients.query)), scale);
    if (gradients.key_weight) weight_gradient(given.query, key_gradient, scale, gradients.key_weight);
    if (gradients.visual) visual_gradient(derivatives, pass, units, gradients.visual);
  }

  // dX = unit [w; dS]^T [dY; U] for each sample.
  void visual_gradient(const Derivatives<T>& derivatives, const TokenPass<T>& pass, const float* units,
                       void* gradient) {
    const auto coefficients = contiguous(derivatives.coefficients, 2 * rows, derivatives.coefficient_pitch);
    const auto result = contiguous(static_cast<T*>(gradient), given.tokens, given.visual_width);
    product<ByDepth>(given.batch, given.tokens, 2 * rows, given.visual_width,
                     stack(coefficients, 2 * rows * derivatives.coefficient_pitch),
                     stack(contiguous(pass.operand, 2 * rows, pitch), pass.operand_stride),
                     stack(result, given.tokens * given.visual_width), 1,
                     Stack<float>{{units, given.tokens, 0, 0}, 1, false});
  }
};

const char* forward(const PromptCompress& given, const PromptCompressResults& results, const Runtime& runtime) {
  return given.float_weights ? Call<float>(given, runtime).forward(results) : Call<T>(given, runtime).forward(results);
}

const char* backward(const PromptCompress& given, const PromptCompressGradients& gradients, const Runtime& runtime) {
  return given.float_weights ? Call<float>(given, runtime).backward(gradients)
                             : Call<T>(given, runtime).backward(gradients);
}

}  // namespace

extern const PromptCompressKernels prompt_compress{forward, backward};

}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
