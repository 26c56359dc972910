// The backward of prompt_compress; prompt_compress.cu says how its work is laid out. Compiled once per type of the
// activations, as the forward is.

#include "prompt_compress_backward.cuh"

#include "prompt_compress_call.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {
namespace {

template <class L>
constexpr Choice<Derivatives<T>> DERIVE = {L::WIDTH, L::template shared_bytes<T>(), derive_kernel<T, L>};

constexpr Choice<Derivatives<T>> DERIVES[] = {DERIVE<Columns256>, DERIVE<Columns512>, DERIVE<Columns768>,
                                              DERIVE<Widest>};

// The weights' type is W.
template <class W>
class Backward : PromptCompressCall {
  const Choice<Derivatives<T>>& choice = choose(DERIVES, given.visual_width, device);

 public:
  using PromptCompressCall::PromptCompressCall;

  const char* run(const PromptCompressGradients& gradients) {
    // In each sample dY, and after it, for the tokens' gradient, U.
    const bool wide = gradients.visual.data != nullptr;
    const int64_t operand_rows = wide ? 2 * rows : rows;
    T* const derivatives = scratch<T>(given.batch * operand_rows * pitch);
    T* const keys = wide ? derivatives + rows * pitch : nullptr;
    const auto kept = what_was_kept(gradients, keys, operand_rows);
    float* const units = scratch<float>(2 * given.batch);
    float* const per_units = units + given.batch;
    launches.add(units_kernel<T>, blocks_of(given.batch, 1), ROW_THREADS, ROW_THREADS / 32 * sizeof(float),
                 matrix<T>(gradients.grad), given.queries, static_cast<int>(inner_width()), units, per_units);
    absorb(gradients.grad, given.value_weight, 1, per_units, derivatives, operand_rows);
    const TokenPass<T> pass = describe(derivatives, operand_rows, choice.width);
    const MomentsOf<T, W> of{matrix<T>(gradients.grad),
                             data_of<const W>(given.value_bias),
                             per_units,
                             static_cast<int>(given.heads),
                             static_cast<int>(given.head_width),
                             static_cast<int>(given.queries),
                             kept.probabilities,
                             kept.attended,
                             scratch<float>(row_count),
                             scratch<RowMoments>(row_count)};
    launches.add(moments_kernel<T, W>, blocks_of(row_count, ROW_THREADS / 32), ROW_THREADS, 0, pass, of);
    if (gradients.query.data || gradients.key_weight.data || wide) differentiate_scores(gradients, pass, kept, of, units);
    if (gradients.value_weight.data) weight_gradient(gradients.grad, kept.attended, 1, gradients.value_weight);
    if (gradients.value_bias.data)
      product<ByDepth>(given.heads, given.head_width, given.batch * given.queries, 1, of_heads(gradients.grad),
                       of_rows(of.weight_sums, 1),
                       stack(contiguous(data_of<W>(gradients.value_bias), given.head_width, 1), given.head_width));
    return launches.error();
  }

 private:
  struct Kept {
    const float *probabilities, *attended;
  };

  // What the forward kept, or the forward again; and U in `keys`, where there is room for it.
  Kept what_was_kept(const PromptCompressGradients& gradients, T* keys, int64_t operand_rows) {
    const bool all_kept = gradients.kept.probabilities && gradients.kept.attended;
    if (!keys && !all_kept) {
      keys = scratch<T>(row_count * pitch);
      operand_rows = rows;
    }
    if (keys) absorb(given.query, given.key_weight, scale, nullptr, keys, operand_rows);
    if (all_kept) return {gradients.kept.probabilities, gradients.kept.attended};
    const PromptCompressKept again{scratch<float>(row_count), scratch<float>(row_count * given.tokens),
                                   scratch<float>(row_count * given.visual_width)};
    attend(keys, operand_rows, again, scratch<float>(row_count));
    return {again.probabilities, again.attended};
  }

  // [heads * head_width, visual_width] = sum over samples and queries of activations (x) row_values.
  void weight_gradient(const Rows& activations, const float* row_values, float factor, const Rows& gradient) {
    const auto result = contiguous(data_of<W>(gradient), given.head_width, given.visual_width);
    product<ByDepth>(given.heads, given.head_width, given.batch * given.queries, given.visual_width,
                     of_heads(activations), of_rows(row_values, given.visual_width),
                     stack(result, given.head_width * given.visual_width), factor);
  }

  // The gradients that come of the scores: those of query, key_weight and visual.
  void differentiate_scores(const PromptCompressGradients& gradients, const TokenPass<T>& pass, const Kept& kept,
                            const MomentsOf<T, W>& of, const float* units) {
    const int coefficient_pitch = static_cast<int>(ceil_div(given.tokens, 8) * 8);
    Derivatives<T> derivatives{kept.probabilities, of.moments, nullptr, coefficient_pitch};
    if (gradients.visual.data) derivatives.coefficients = scratch<T>(2 * row_count * derivatives.coefficient_pitch);
    pass_over(choice, pass, derivatives);
    float* const key_gradient = scratch<float>(row_count * given.visual_width);
    launches.add(sum_splits_kernel, blocks_of(row_count * given.visual_width, ROW_THREADS), ROW_THREADS, 0, pass.parts,
                 pass.splits, given.batch, rows * given.visual_width, units, key_gradient);
    if (gradients.query.data)
      project(key_gradient, given.key_weight, gradients.query, scale);
    if (gradients.key_weight.data) weight_gradient(given.query, key_gradient, scale, gradients.key_weight);
    if (gradients.visual.data) visual_gradient(derivatives, pass, units, gradients.visual);
  }

  // dX = unit [w; dS]^T [dY; U] for each sample.
  void visual_gradient(const Derivatives<T>& derivatives, const TokenPass<T>& pass, const float* units,
                       const Rows& gradient) {
    const auto coefficients = contiguous(derivatives.coefficients, 2 * rows, derivatives.coefficient_pitch);
    const auto result = contiguous(data_of<T>(gradient), given.tokens, given.visual_width);
    product<ByDepth>(given.batch, given.tokens, 2 * rows, given.visual_width,
                     stack(coefficients, 2 * rows * derivatives.coefficient_pitch),
                     stack(contiguous(pass.operand, 2 * rows, pitch), pass.operand_stride),
                     stack(result, given.tokens * given.visual_width), 1,
                     Stack<float>{{units, given.tokens, 0, 0}, 1, false});
  }
};

}  // namespace

const char* prompt_compress_backward(const PromptCompress& given, const PromptCompressGradients& gradients,
                                     const Runtime& runtime) {
  return given.key_weight.dtype == Dtype::FLOAT32 ? Backward<float>(given, runtime).run(gradients)
                             : Backward<T>(given, runtime).run(gradients);
}

}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
