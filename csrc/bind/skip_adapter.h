// skip_adapter's binding, for every device.

#pragma once

#include "../skip_adapter.h"
#include "tensors.h"

namespace fast_prompt {
namespace {

// A parameter has a leading dimension of adapters, or is the only adapter's.
struct SkipAdapterArguments {
  Tensor x, down_weight, up_weight;
  OptionalTensor down_bias, up_bias, norm_weight, norm_bias, scale, gates, route;
  SkipAdapter problem{};

  SkipAdapterArguments(const Tensor& any_x, const Tensor& any_down_weight, const Tensor& any_up_weight,
                       const OptionalTensor& any_down_bias, const OptionalTensor& any_up_bias,
                       const OptionalTensor& any_norm_weight, const OptionalTensor& any_norm_bias,
                       const OptionalTensor& scale, const OptionalTensor& gates, const OptionalTensor& route,
                       const OptionalTensor& seed, int64_t norm, int64_t activation, int64_t residual, double eps,
                       double dropout_p, ScalarType hidden_type)
      : x(side_by_side(any_x)),
        down_weight(side_by_side(any_down_weight)),
        up_weight(side_by_side(any_up_weight)),
        down_bias(side_by_side(any_down_bias)),
        up_bias(side_by_side(any_up_bias)),
        norm_weight(side_by_side(any_norm_weight)),
        norm_bias(side_by_side(any_norm_bias)),
        scale(scale ? OptionalTensor(torch::stable::contiguous(*scale)) : std::nullopt),
        gates(gates ? OptionalTensor(torch::stable::contiguous(*gates)) : std::nullopt),
        route(route) {
    check_activations(x, "x");
    const int64_t rank = down_weight.dim();
    STD_TORCH_CHECK((rank == 2 || rank == 3) && up_weight.dim() == rank && down_weight.numel() > 0,
                    "down_weight: expected a matrix or a batch of matrices, not empty, and up_weight alike");
    problem.batch = samples_of(x);
    problem.tokens = x.size(x.dim() - 2);
    problem.width = x.size(x.dim() - 1);
    problem.adapters = rank == 3 ? down_weight.size(0) : 1;
    problem.adapter_width = down_weight.size(rank - 2);
    if (gates) {
      STD_TORCH_CHECK(gates->dim() == 2 && gates->numel() > 0 && problem.adapters == 1 && !route,
                      "gates: expected [batch, experts], a single adapter and no route");
      check_contiguous(this->gates, "gates", ScalarType::Float, {problem.batch, gates->size(1)}, x);
    }
    problem.experts = gates ? gates->size(1) : 1;
    check_parameters(rank == 3);
    if (scale) {
      STD_TORCH_CHECK(scale->numel() == problem.adapters, "scale: expected one an adapter");
      check_contiguous(this->scale, "scale", ScalarType::Float, sizes_of(*scale), x);
    }
    check_contiguous(route, "route", ScalarType::Long, {problem.batch}, x);
    problem.norm = option<SkipNorm>("norm", norm);
    problem.activation = option<SkipActivation>("activation", activation);
    problem.residual = option<SkipResidual>("residual", residual);
    const bool before = problem.norm == SkipNorm::LAYER || problem.norm == SkipNorm::RMS;
    STD_TORCH_CHECK((problem.norm != SkipNorm::NONE) == norm_weight.has_value(), "norm_weight: needed for a norm");
    STD_TORCH_CHECK(!norm_bias || problem.norm == SkipNorm::LAYER || problem.norm == SkipNorm::LAYER_AFTER,
                    "norm_bias: none for this norm");
    STD_TORCH_CHECK(problem.residual != SkipResidual::NORMED || before, "residual: no norm before");
    problem.eps = static_cast<float>(eps);
    problem.dropout = dropout_of(seed, dropout_p, x);
    problem.hidden_dtype = hidden_type == ScalarType::Float ? Dtype::FLOAT32 : dtype_of(x);
    describe();
  }

  // Of the hidden layer that a forward keeps.
  Sizes hidden_sizes() const {
    return {route ? 1 : problem.adapters, problem.batch, problem.tokens, problem.adapter_width};
  }

 private:
  void check_parameters(bool stacked) {
    const auto each = [&](Sizes sizes) {
      if (stacked) sizes.insert(sizes.begin(), problem.adapters);
      return sizes;
    };
    const int64_t width = problem.width, adapter_width = problem.adapter_width;
    check_weight(down_weight, "down_weight", each({adapter_width, width}), x);
    const int64_t columns = up_weight.size(up_weight.dim() - 1), all = problem.experts * adapter_width;
    problem.groups = columns > 0 ? all / columns : 0;
    STD_TORCH_CHECK(problem.groups > 0 && problem.groups * columns == all && width % problem.groups == 0 &&
                        adapter_width % problem.groups == 0 && (gates || problem.groups == 1),
                    "up_weight: ", columns, " columns do not fit");
    check_parameter(up_weight, "up_weight", each({width, columns}), down_weight);
    check_parameter(down_bias, "down_bias", each({adapter_width}), down_weight);
    if (gates)
      check_parameter(up_bias, "up_bias", each({problem.experts, width}), down_weight);
    else
      check_parameter(up_bias, "up_bias", each({width}), down_weight);
    check_parameter(norm_weight, "norm_weight", each({width}), down_weight);
    check_parameter(norm_bias, "norm_bias", each({width}), down_weight);
  }

  void describe() {
    problem.x = rows_of(x);
    problem.down_weight = rows_of(down_weight);
    problem.up_weight = rows_of(up_weight);
    problem.down_bias = rows_of(down_bias);
    problem.up_bias = rows_of(up_bias);
    problem.norm_weight = rows_of(norm_weight);
    problem.norm_bias = rows_of(norm_bias);
    problem.scale = floats_of(scale);
    problem.gates = floats_of(gates);
    if (!route) return;
    problem.route = route->const_data_ptr<int64_t>();
    for (int64_t sample = 0; route->is_cpu() && sample < problem.batch; ++sample)
      STD_TORCH_CHECK(problem.route[sample] < problem.adapters, "route: there are ", problem.adapters, " adapters");
  }
};

// The output, then the hidden layer if it is to be kept.
template <class Device>
std::vector<Tensor> skip_adapter(Tensor x, Tensor down_weight, Tensor up_weight, OptionalTensor down_bias,
                                 OptionalTensor up_bias, OptionalTensor norm_weight, OptionalTensor norm_bias,
                                 OptionalTensor scale, OptionalTensor gates, OptionalTensor kept, OptionalTensor route,
                                 OptionalTensor kept_samples, OptionalTensor seed, int64_t norm, int64_t activation,
                                 int64_t residual, double eps, double dropout_p, std::vector<bool> keep) {
  const ScalarType hidden_type = Device::hidden_type(x.scalar_type());
  const SkipAdapterArguments in(x, down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, scale, gates,
                                route, seed, norm, activation, residual, eps, dropout_p, hidden_type);
  STD_TORCH_CHECK(keep.size() == 1, "keep: expected one flag");
  typename Device::Call call(in.x);
  std::vector<Tensor> results{call.empty(sizes_of(x), x.scalar_type())};
  void* hidden = nullptr;
  if (keep[0]) {
    results.push_back(call.empty(in.hidden_sizes(), hidden_type));
    hidden = results.back().data_ptr();
  }
  call.run(Device::skip_adapter(in.x).forward, in.problem, SkipAdapterResults{rows_of(results[0]), hidden});
  if (kept_samples && kept_samples->numel() > 0) {
    if (kept) copy_samples(results[0], *kept_samples, *kept);
    if (hidden) clear_samples(results[1], 1, *kept_samples);  // left alone, it would be another at every call
  }
  return results;
}

template <class Device>
std::vector<Tensor> skip_adapter_backward(Tensor grad, Tensor x, Tensor down_weight, Tensor up_weight,
                                          OptionalTensor down_bias, OptionalTensor up_bias, OptionalTensor norm_weight,
                                          OptionalTensor norm_bias, OptionalTensor scale, OptionalTensor gates,
                                          OptionalTensor route, OptionalTensor kept_samples, OptionalTensor seed,
                                          OptionalTensor hidden, int64_t norm, int64_t activation, int64_t residual,
                                          double eps, double dropout_p, std::vector<bool> needs) {
  const ScalarType hidden_type = Device::hidden_type(x.scalar_type());
  const SkipAdapterArguments in(x, down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, scale, gates,
                                route, seed, norm, activation, residual, eps, dropout_p, hidden_type);
  grad = side_by_side(grad);
  check_like(grad, "grad", in.x);
  STD_TORCH_CHECK(hidden, "hidden: needed");
  check_contiguous(hidden, "hidden", hidden_type, in.hidden_sizes(), x);
  typename Device::Call call(in.x);
  Gradients found(call, needs, 10);
  SkipAdapterGradients gradients{};
  gradients.grad = rows_of(grad);
  gradients.hidden = hidden->const_data_ptr();
  gradients.x = found.next(in.x);
  gradients.down_weight = found.next(in.down_weight);
  gradients.up_weight = found.next(in.up_weight);
  gradients.down_bias = found.next(in.down_bias);
  gradients.up_bias = found.next(in.up_bias);
  gradients.norm_weight = found.next(in.norm_weight);
  gradients.norm_bias = found.next(in.norm_bias);
  gradients.scale = found.next_floats(in.scale);
  gradients.gates = found.next_floats(in.gates);
  if (!found.tensors.empty()) call.run(Device::skip_adapter(in.x).backward, in.problem, gradients);
  if (gradients.x.data && kept_samples && kept_samples->numel() > 0) clear_samples(found.tensors[0], 0, *kept_samples);
  if (needs.back()) {
    STD_TORCH_CHECK(kept_samples, "kept_samples: needed for the gradient of kept");
    found.tensors.push_back(select_samples(grad, *kept_samples));
  }
  return found.tensors;
}

}  // namespace
}  // namespace fast_prompt
