// prompt_compress on CUDA GPUs, sm_80 and up: see ../prompt_compress.h for what it computes. Not yet run on a GPU.
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

#include "kernels.h"
#include "prompt_compress_call.cuh"
#include "prompt_compress_rows.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {
namespace {

template <class L>
constexpr Choice<SoftmaxResults> ATTEND = {L::WIDTH, L::template shared_bytes<T>(), attend_kernel<T, L>};

constexpr Choice<SoftmaxResults> ATTENDS[] = {ATTEND<Columns256>, ATTEND<Columns512>, ATTEND<Columns768>,
                                              ATTEND<Widest>};

}  // namespace

void PromptCompressCall::absorb(const Rows& activations, const Rows& weight, float factor, const float* sample_scale,
                                T* operand, int64_t operand_rows) {
  const Stack<float> row_scale{{sample_scale, given.queries, 1, 0}, 0, false};
  const auto with = [&](const auto& weights) {
    product<Plain>(given.heads, given.batch * given.queries, given.head_width, given.visual_width,
                   of_heads(activations), weights, of_rows(operand, pitch, operand_rows), factor, row_scale, {},
                   pitch);
  };
  given.key_weight.dtype == Dtype::FLOAT32 ? with(of_weight<float>(weight)) : with(of_weight<T>(weight));
}

void PromptCompressCall::project(const float* row_values, const Rows& weight, const Rows& result, float factor,
                                 const float* weight_sums) {
  const Stack<float> row_bias = weight_sums ? of_rows(weight_sums, 1) : Stack<float>{};
  const auto with = [&](const auto& weights) {
    product<ByColumn>(given.heads, given.batch * given.queries, given.visual_width, given.head_width,
                      of_rows(row_values, given.visual_width), weights, of_heads(result), factor, {},
                      row_bias);
  };
  given.key_weight.dtype == Dtype::FLOAT32 ? with(of_weight<float>(weight)) : with(of_weight<T>(weight));
}

const float* PromptCompressCall::attend(const T* keys, int64_t operand_rows, const PromptCompressKept& kept,
                                        float* weight_sums) {
  const auto& choice = choose(ATTENDS, given.visual_width, device);
  const TokenPass<T> pass = describe(keys, operand_rows, choice.width);
  const SoftmaxResults found{kept.probabilities, scratch<RowSums>(pass.splits * row_count)};
  float* const attended = kept.attended ? kept.attended : scratch<float>(row_count * given.visual_width);
  pass_over(choice, pass, found);
  const Combination all{pass.parts, found.sums, row_count, pass.splits, pass.tokens, pass.width, given.dropout.kept_scale};
  launches.add(combine_kernel, blocks_of(row_count, 1), ROW_THREADS, 0, all, attended, kept.logsumexp, weight_sums,
               kept.probabilities);
  return attended;
}

const char* PromptCompressCall::forward(const PromptCompressResults& results) {
  T* const keys = scratch<T>(row_count * pitch);
  absorb(given.query, given.key_weight, scale, nullptr, keys, rows);
  float* const weight_sums = scratch<float>(row_count);
  const float* attended = attend(keys, rows, results.kept, weight_sums);
  project(attended, given.value_weight, results.output, 1, given.value_bias.data ? weight_sums : nullptr);
  return launches.error();
}

namespace {

const char* forward(const PromptCompress& given, const PromptCompressResults& results, const Runtime& runtime) {
  return PromptCompressCall(given, runtime).forward(results);
}

}  // namespace

extern const PromptCompressKernels<Runtime> prompt_compress{forward, prompt_compress_backward};

}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
