// prompt_compress's binding, for every device.

#pragma once

#include "../prompt_compress.h"
#include "tensors.h"

namespace fast_prompt {
namespace {

struct PromptCompressArguments {
  Tensor query, visual, key_weight, value_weight;
  OptionalTensor key_bias, value_bias;
  PromptCompress problem{};

  PromptCompressArguments(const Tensor& any_query, const Tensor& any_visual, const Tensor& any_key_weight,
                          const Tensor& any_value_weight, const OptionalTensor& key_bias,
                          const OptionalTensor& any_value_bias, const OptionalTensor& key_padding_mask,
                          const OptionalTensor& seed, int64_t num_heads, double dropout_p)
      : query(side_by_side(any_query)),
        visual(side_by_side(any_visual)),
        key_weight(side_by_side(any_key_weight)),
        value_weight(side_by_side(any_value_weight)),
        key_bias(key_bias),
        value_bias(side_by_side(any_value_bias)) {
    check_activations(query, "query");
    check_activations(visual, "visual");
    STD_TORCH_CHECK(query.dim() == 3 && visual.dim() == 3 && visual.size(0) == query.size(0),
                    "visual: expected [batch, tokens, width], query [batch, queries, width]");
    STD_TORCH_CHECK(visual.scalar_type() == query.scalar_type(), "visual: expected the dtype of query");
    check_device(visual, "visual", query);
    const int64_t width = query.size(2);
    STD_TORCH_CHECK(num_heads > 0 && width % num_heads == 0, "num_heads: ", num_heads, " does not divide ", width);
    problem.batch = query.size(0);
    problem.queries = query.size(1);
    problem.tokens = visual.size(1);
    problem.heads = num_heads;
    problem.head_width = width / num_heads;
    problem.visual_width = visual.size(2);
    check_weight(key_weight, "key_weight", {width, problem.visual_width}, query);
    check_parameter(value_weight, "value_weight", {width, problem.visual_width}, key_weight);
    check_parameter(value_bias, "value_bias", {width}, key_weight);
    problem.query = rows_of(query);
    problem.visual = rows_of(visual);
    problem.key_weight = rows_of(key_weight);
    problem.value_weight = rows_of(value_weight);
    problem.value_bias = rows_of(value_bias);
    if (key_padding_mask) {
      check_sizes(*key_padding_mask, "key_padding_mask", {problem.batch, problem.tokens});
      STD_TORCH_CHECK(key_padding_mask->scalar_type() == ScalarType::Bool, "key_padding_mask: expected bool");
      check_device(*key_padding_mask, "key_padding_mask", query);
      problem.padding = {key_padding_mask->const_data_ptr<bool>(), key_padding_mask->stride(0),
                         key_padding_mask->stride(1)};
    }
    problem.dropout = dropout_of(seed, dropout_p, query);
  }

  // Sizes of the logarithms of the sums of exponentials, of the probabilities and of the weighted tokens.
  std::array<Sizes, 3> kept_sizes() const {
    const Sizes rows{problem.batch, problem.heads, problem.queries};
    Sizes by_token = rows, by_column = rows;
    by_token.push_back(problem.tokens);
    by_column.push_back(problem.visual_width);
    return {rows, by_token, by_column};
  }
};

// The output, then what is to be kept: the logarithms, which are always there, the probabilities, the weighted tokens.
template <class Device>
std::vector<Tensor> prompt_compress(Tensor query, Tensor visual, Tensor key_weight, Tensor value_weight,
                                    OptionalTensor key_bias, OptionalTensor value_bias,
                                    OptionalTensor key_padding_mask, OptionalTensor seed, int64_t num_heads,
                                    double dropout_p, std::vector<bool> keep) {
  const PromptCompressArguments in(query, visual, key_weight, value_weight, key_bias, value_bias, key_padding_mask,
                                   seed, num_heads, dropout_p);
  STD_TORCH_CHECK(keep.size() == 3 && keep[0], "keep: expected three flags, the first set");
  typename Device::Call call(in.query);
  std::vector<Tensor> results{call.empty(sizes_of(query), query.scalar_type())};
  const auto sizes = in.kept_sizes();
  float* kept[3] = {};
  for (size_t index = 0; index < 3; ++index)
    if (keep[index]) {
      results.push_back(call.empty(sizes[index], ScalarType::Float));
      kept[index] = results.back().mutable_data_ptr<float>();
    }
  call.run(Device::prompt_compress(in.query).forward, in.problem,
           PromptCompressResults{rows_of(results[0]), {kept[0], kept[1], kept[2]}});
  return results;
}

template <class Device>
std::vector<Tensor> prompt_compress_backward(Tensor grad, Tensor query, Tensor visual, Tensor key_weight,
                                             Tensor value_weight, OptionalTensor key_bias, OptionalTensor value_bias,
                                             OptionalTensor key_padding_mask, OptionalTensor seed,
                                             OptionalTensor logsumexp, OptionalTensor probabilities,
                                             OptionalTensor attended, int64_t num_heads, double dropout_p,
                                             std::vector<bool> needs) {
  const PromptCompressArguments in(query, visual, key_weight, value_weight, key_bias, value_bias, key_padding_mask,
                                   seed, num_heads, dropout_p);
  grad = side_by_side(grad);
  check_like(grad, "grad", in.query);
  STD_TORCH_CHECK(logsumexp, "logsumexp: needed");
  const auto sizes = in.kept_sizes();
  check_contiguous(logsumexp, "logsumexp", ScalarType::Float, sizes[0], query);
  check_contiguous(probabilities, "probabilities", ScalarType::Float, sizes[1], query);
  check_contiguous(attended, "attended", ScalarType::Float, sizes[2], query);
  typename Device::Call call(in.query);
  Gradients found(call, needs, 6);
  PromptCompressGradients gradients{};
  gradients.grad = rows_of(grad);
  gradients.kept = {floats_of(logsumexp), floats_of(probabilities), floats_of(attended)};
  gradients.query = found.next(in.query);
  gradients.visual = found.next(in.visual);
  gradients.key_weight = found.next(in.key_weight);
  gradients.value_weight = found.next(in.value_weight);
  found.next_zeros(in.key_bias);  // it shifts a row's scores alike
  gradients.value_bias = found.next(in.value_bias);
  if (!found.tensors.empty()) call.run(Device::prompt_compress(in.query).backward, in.problem, gradients);
  return found.tensors;
}

}  // namespace
}  // namespace fast_prompt
