// What the CPU's and CUDA's bindings have in common: the checks that keep a wrong call from reading wild memory. The
// messages are for developers; users meet those of fast_prompt/ops first.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace fast_prompt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The options, by number: torch's stable ABI makes a new string of every `str` argument and never frees it. The order is
// that of OPTIONS in fast_prompt/backends/native.py and of the kernels' own enums; COUNT says how many there are.
enum class DiffusionActivation { RELU, SOFTMAX, COUNT };
enum class RowWeight { MAX, NONE, COUNT };
enum class SkipNorm { NONE, LAYER, RMS, LAYER_AFTER, COUNT };
enum class SkipActivation { RELU, SILU, GELU, COUNT };
enum class SkipResidual { INPUT, NORMED, NONE, COUNT };

template <class Option>
Option option(const char* name, int64_t number) {
  constexpr auto count = static_cast<int64_t>(Option::COUNT);
  STD_TORCH_CHECK(0 <= number && number < count, name, ": expected a number from 0 to ", count - 1, ", got ", number);
  return static_cast<Option>(number);
}

inline void check_sizes(const Tensor& tensor, const char* name, const std::vector<int64_t>& expected) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(std::vector<int64_t>(sizes.begin(), sizes.end()) == expected, name, ": wrong size");
}

// A row, a matrix or a batch of matrices of a type that there are kernels for, elements of a row side by side.
inline void check_rows(const Tensor& tensor, const char* name) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t rank = sizes.size();
  STD_TORCH_CHECK(1 <= rank && rank <= 3, name, ": expected a row, a matrix or a batch of matrices, got rank ", rank);
  STD_TORCH_CHECK(sizes[rank - 1] == 1 || strides[rank - 1] == 1, name, ": the last stride must be 1");
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  ": expected float32, bfloat16 or float16");
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(tensor.is_cpu() == other.is_cpu() && tensor.get_device_index() == other.get_device_index(), name,
                  ": expected the device of the activations");
}

inline void check_seed(const std::optional<Tensor>& seed, double dropout_p, const Tensor& activations) {
  if (dropout_p == 0) return;
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed: dropout needs an int64 scalar");
  check_same_device(*seed, "seed", activations);
}

inline void check_activations(const Tensor& tensor, const char* name, const Tensor& source) {
  check_rows(tensor, name);
  check_sizes(tensor, name, {source.sizes()[0], source.sizes()[1], source.sizes()[2]});
  STD_TORCH_CHECK(tensor.scalar_type() == source.scalar_type(), name, ": expected the dtype of source");
  check_same_device(tensor, name, source);
}

inline void check_prompt_diffusion(const std::optional<Tensor>& hidden, const Tensor& source, const Tensor& prompts,
                                   const Tensor& keys, const Tensor& log_scale, const std::optional<Tensor>& seed,
                                   double dropout_p) {
  check_rows(source, "source");
  STD_TORCH_CHECK(source.sizes().size() == 3 && source.numel() > 0, "source: expected [batch, rows, width], not empty");
  if (hidden) check_activations(*hidden, "hidden", source);
  check_rows(prompts, "prompts");
  STD_TORCH_CHECK(prompts.sizes().size() == 2 && prompts.numel() > 0, "prompts: expected [num_prompts, width]");
  check_sizes(prompts, "prompts", {prompts.sizes()[0], source.sizes()[2]});
  check_same_device(prompts, "prompts", source);
  check_rows(keys, "keys");
  check_sizes(keys, "keys", {prompts.sizes()[0], source.sizes()[2]});
  STD_TORCH_CHECK(keys.scalar_type() == prompts.scalar_type(), "keys: expected the dtype of prompts");
  check_same_device(keys, "keys", source);
  STD_TORCH_CHECK(log_scale.scalar_type() == ScalarType::Float && log_scale.numel() == 1,
                  "log_scale: expected one float32");
  check_same_device(log_scale, "log_scale", source);
  check_seed(seed, dropout_p, source);
}

// One of the op's parameters: of the given sizes, and of key_weight's dtype.
inline void check_parameter(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes,
                            const Tensor& key_weight) {
  check_rows(tensor, name);
  check_sizes(tensor, name, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == key_weight.scalar_type(), name, ": expected the dtype of key_weight");
  check_same_device(tensor, name, key_weight);
}

inline void check_prompt_compress(const Tensor& query, const Tensor& visual, const Tensor& key_weight,
                                  const Tensor& value_weight, const std::optional<Tensor>& value_bias,
                                  const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& seed,
                                  int64_t num_heads, double dropout_p) {
  check_rows(query, "query");
  STD_TORCH_CHECK(query.sizes().size() == 3 && query.numel() > 0, "query: expected [batch, queries, width], not empty");
  const int64_t batch = query.sizes()[0], width = query.sizes()[2];
  STD_TORCH_CHECK(num_heads > 0 && width % num_heads == 0, "num_heads: ", num_heads, " does not divide ", width);
  check_rows(visual, "visual");
  STD_TORCH_CHECK(visual.sizes().size() == 3 && visual.numel() > 0 && visual.sizes()[0] == batch,
                  "visual: expected [batch, tokens, width], not empty");
  STD_TORCH_CHECK(visual.scalar_type() == query.scalar_type(), "visual: expected the dtype of query");
  check_same_device(visual, "visual", query);
  const int64_t tokens = visual.sizes()[1], visual_width = visual.sizes()[2];
  check_same_device(key_weight, "key_weight", query);
  check_parameter(key_weight, "key_weight", {width, visual_width}, key_weight);
  check_parameter(value_weight, "value_weight", {width, visual_width}, key_weight);
  STD_TORCH_CHECK(key_weight.scalar_type() == query.scalar_type() || key_weight.scalar_type() == ScalarType::Float,
                  "key_weight: expected the dtype of query, or float32");
  if (value_bias) check_parameter(*value_bias, "value_bias", {width}, key_weight);
  if (key_padding_mask) {
    check_sizes(*key_padding_mask, "key_padding_mask", {batch, tokens});
    STD_TORCH_CHECK(key_padding_mask->scalar_type() == ScalarType::Bool, "key_padding_mask: expected bool");
    check_same_device(*key_padding_mask, "key_padding_mask", query);
  }
  check_seed(seed, dropout_p, query);
}

// What a forward kept for the backward: [batch, heads, queries] and a last size, if any; contiguous float32.
inline void check_kept(const Tensor& tensor, const char* name, const Tensor& query, int64_t num_heads,
                       std::optional<int64_t> last) {
  std::vector<int64_t> sizes{query.sizes()[0], num_heads, query.sizes()[1]};
  if (last) sizes.push_back(*last);
  check_sizes(tensor, name, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous(), name,
                  ": expected contiguous float32");
  check_same_device(tensor, name, query);
}

struct SkipOptions {
  SkipNorm norm;
  SkipActivation activation;
  SkipResidual residual;

  SkipOptions(int64_t norm, int64_t activation, int64_t residual)
      : norm(option<SkipNorm>("norm", norm)),
        activation(option<SkipActivation>("activation", activation)),
        residual(option<SkipResidual>("residual", residual)) {}
};

// What both directions of skip_adapter are given, as fast_prompt/backends/native.py says; A adapters lead every parameter.
struct SkipAdapterInputs {
  const Tensor &x, &down_weight, &up_weight;
  const std::optional<Tensor>&down_bias, &up_bias, &norm_weight, &norm_bias, &scale, &gates, &route, &seed;
  SkipOptions options;
  double dropout_p;

  int64_t batch() const { return x.sizes()[0]; }
  int64_t tokens() const { return x.sizes()[1]; }
  int64_t width() const { return x.sizes()[2]; }
  int64_t adapters() const { return down_weight.sizes()[0]; }
  int64_t adapter_width() const { return down_weight.sizes()[1]; }
  int64_t experts() const { return gates ? gates->sizes()[1] : 1; }
  int64_t groups() const { return experts() * adapter_width() / up_weight.sizes()[2]; }
  // Of the hidden layer that a forward keeps.
  std::vector<int64_t> hidden_sizes() const { return {route ? 1 : adapters(), batch(), tokens(), adapter_width()}; }
};

inline void check_contiguous(const Tensor& tensor, const char* name, ScalarType type, const std::vector<int64_t>& sizes,
                             const Tensor& activations) {
  check_sizes(tensor, name, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous(), name,
                  ": expected a contiguous tensor of another dtype or layout");
  check_same_device(tensor, name, activations);
}

inline void check_skip_adapter_parameters(const SkipAdapterInputs& in) {
  const int64_t adapters = in.adapters(), width = in.width(), adapter_width = in.adapter_width();
  const auto check = [&](const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes) {
    check_rows(tensor, name);
    check_sizes(tensor, name, sizes);
    STD_TORCH_CHECK(tensor.scalar_type() == in.down_weight.scalar_type(), name, ": expected the dtype of down_weight");
    check_same_device(tensor, name, in.x);
  };
  check(in.down_weight, "down_weight", {adapters, adapter_width, width});
  STD_TORCH_CHECK(in.up_weight.sizes().size() == 3 && in.up_weight.numel() > 0,
                  "up_weight: expected a batch of matrices");
  const int64_t up_columns = in.up_weight.sizes()[2], groups = in.groups();
  STD_TORCH_CHECK(groups > 0 && groups * up_columns == in.experts() * adapter_width && width % groups == 0 &&
                      adapter_width % groups == 0 && (in.gates || groups == 1),
                  "up_weight: ", up_columns, " columns do not fit");
  check(in.up_weight, "up_weight", {adapters, width, up_columns});
  if (in.down_bias) check(*in.down_bias, "down_bias", {adapters, adapter_width});
  if (in.up_bias && in.gates) check(*in.up_bias, "up_bias", {1, in.experts(), width});
  if (in.up_bias && !in.gates) check(*in.up_bias, "up_bias", {adapters, width});
  if (in.norm_weight) check(*in.norm_weight, "norm_weight", {adapters, width});
  if (in.norm_bias) check(*in.norm_bias, "norm_bias", {adapters, width});
}

inline void check_skip_adapter(const SkipAdapterInputs& in) {
  check_rows(in.x, "x");
  STD_TORCH_CHECK(in.x.sizes().size() == 3 && in.x.numel() > 0, "x: expected [batch, rows, width], not empty");
  STD_TORCH_CHECK(in.down_weight.sizes().size() == 3 && in.down_weight.numel() > 0,
                  "down_weight: expected a batch of matrices, not empty");
  const ScalarType weight_type = in.down_weight.scalar_type();
  STD_TORCH_CHECK(weight_type == in.x.scalar_type() || weight_type == ScalarType::Float,
                  "down_weight: expected the dtype of x, or float32");
  if (in.gates) {
    STD_TORCH_CHECK(in.gates->sizes().size() == 2 && in.gates->numel() > 0 && in.adapters() == 1 && !in.route,
                    "gates: expected [batch, experts], a single adapter and no route");
    check_contiguous(*in.gates, "gates", ScalarType::Float, {in.batch(), in.experts()}, in.x);
  }
  check_skip_adapter_parameters(in);
  if (in.scale) check_contiguous(*in.scale, "scale", ScalarType::Float, {in.adapters()}, in.x);
  if (in.route) check_contiguous(*in.route, "route", ScalarType::Long, {in.batch()}, in.x);
  const SkipNorm norm = in.options.norm;
  const bool layer = norm == SkipNorm::LAYER, rms = norm == SkipNorm::RMS;
  STD_TORCH_CHECK((norm != SkipNorm::NONE) == in.norm_weight.has_value(), "norm_weight: needed exactly for a norm");
  STD_TORCH_CHECK(!in.norm_bias || layer || norm == SkipNorm::LAYER_AFTER, "norm_bias: none for this norm");
  STD_TORCH_CHECK(in.options.residual != SkipResidual::NORMED || layer || rms, "residual: no norm before");
  check_seed(in.seed, in.dropout_p, in.x);
}

// `hidden_type`: of the hidden layer that a forward keeps.
inline void check_skip_adapter_backward(const SkipAdapterInputs& in, const Tensor& grad, const Tensor& hidden,
                                        ScalarType hidden_type, const std::vector<bool>& needs) {
  check_activations(grad, "grad", in.x);
  check_contiguous(hidden, "hidden", hidden_type, in.hidden_sizes(), in.x);
  const bool given[] = {true,
                        true,
                        true,
                        in.down_bias.has_value(),
                        in.up_bias.has_value(),
                        in.norm_weight.has_value(),
                        in.norm_bias.has_value(),
                        in.scale.has_value(),
                        in.gates.has_value()};
  STD_TORCH_CHECK(needs.size() == std::size(given), "needs: expected ", std::size(given), " flags");
  for (size_t index = 0; index < needs.size(); ++index)
    STD_TORCH_CHECK(given[index] || !needs[index], "needs: there is no argument ", index);
}

inline uint32_t dropout_threshold(double dropout_p) {
  return static_cast<uint32_t>(std::fmin(std::nearbyint(dropout_p * 0x1p32), 0xFFFFFFFF));
}

inline float kept_scale(double dropout_p) { return static_cast<float>(1 / (1 - dropout_p)); }

}  // namespace fast_prompt
