// prompt_diffusion's binding, for every device.

#pragma once

#include "../prompt_diffusion.h"
#include "tensors.h"

namespace fast_prompt {
namespace {

struct PromptDiffusionArguments {
  Tensor source, prompts, keys, log_scale;
  PromptDiffusion problem{};

  PromptDiffusionArguments(const Tensor& any_source, const Tensor& any_prompts, const Tensor& any_keys,
                           const Tensor& log_scale, const OptionalTensor& seed, int64_t activation, int64_t row_weight,
                           double dropout_p)
      : source(side_by_side(any_source)),
        prompts(side_by_side(any_prompts)),
        keys(side_by_side(any_keys)),
        log_scale(log_scale) {
    check_activations(source, "source");
    problem.width = source.size(source.dim() - 1);
    problem.rows = source.numel() / problem.width;
    STD_TORCH_CHECK(prompts.dim() == 2 && prompts.numel() > 0, "prompts: expected [num_prompts, width]");
    problem.num_prompts = prompts.size(0);
    check_weight(prompts, "prompts", {problem.num_prompts, problem.width}, source);
    check_parameter(keys, "keys", {problem.num_prompts, problem.width}, prompts);
    check_number(log_scale, "log_scale", source);
    problem.source = rows_of(source);
    problem.prompts = rows_of(prompts);
    problem.keys = rows_of(keys);
    problem.log_scale = log_scale.const_data_ptr<float>();
    problem.activation = option<DiffusionActivation>("activation", activation);
    problem.row_weight = option<RowWeight>("row_weight", row_weight);
    problem.dropout = dropout_of(seed, dropout_p, source);
  }

  template <class Device>
  void run(const Tensor& hidden, const Tensor& output, typename Device::Call& call) {
    problem.hidden = rows_of(hidden);
    call.run(Device::prompt_diffusion(source).forward, problem, PromptDiffusionResults{rows_of(output)});
  }
};

template <class Device>
std::vector<Tensor> prompt_diffusion(Tensor hidden, Tensor source, Tensor prompts, Tensor keys, Tensor log_scale,
                                     OptionalTensor seed, int64_t activation, int64_t row_weight, double dropout_p) {
  PromptDiffusionArguments in(source, prompts, keys, log_scale, seed, activation, row_weight, dropout_p);
  check_like(hidden, "hidden", in.source);
  typename Device::Call call(in.source);
  const Tensor output = call.empty(sizes_of(hidden), hidden.scalar_type());
  in.run<Device>(side_by_side(hidden), output, call);
  return {output};
}

// Writes the output over hidden.
template <class Device>
void prompt_diffusion_(Tensor hidden, Tensor source, Tensor prompts, Tensor keys, Tensor log_scale,
                       OptionalTensor seed, int64_t activation, int64_t row_weight, double dropout_p) {
  PromptDiffusionArguments in(source, prompts, keys, log_scale, seed, activation, row_weight, dropout_p);
  check_like(hidden, "hidden", in.source);
  STD_TORCH_CHECK(hidden.is_contiguous(), "hidden: expected a contiguous tensor to write over");
  typename Device::Call call(in.source);
  in.run<Device>(hidden, hidden, call);
}

template <class Device>
std::vector<Tensor> prompt_diffusion_backward(Tensor grad, Tensor source, Tensor prompts, Tensor keys, Tensor log_scale,
                                              OptionalTensor seed, OptionalTensor output, int64_t activation,
                                              int64_t row_weight, double dropout_p, std::vector<bool> needs) {
  const PromptDiffusionArguments in(source, prompts, keys, log_scale, seed, activation, row_weight, dropout_p);
  grad = side_by_side(grad);
  check_like(grad, "grad", in.source);
  STD_TORCH_CHECK(output || !needs.back(), "output: needed for the gradient of log_scale");
  if (output) check_like(*output, "output", in.source);
  output = side_by_side(output);
  typename Device::Call call(in.source);
  Gradients found(call, needs, 5);
  PromptDiffusionGradients gradients{};
  gradients.grad = rows_of(grad);
  gradients.output = rows_of(output);
  gradients.hidden = found.next(in.source);
  gradients.source = found.next(in.source);
  gradients.prompts = found.next(in.prompts);
  gradients.keys = found.next(in.keys);
  gradients.log_scale = found.next_floats(in.log_scale);
  if (!found.tensors.empty()) call.run(Device::prompt_diffusion(in.source).backward, in.problem, gradients);
  return found.tensors;
}

}  // namespace
}  // namespace fast_prompt
