// What the CPU's and CUDA's bindings have in common: the checks that keep a wrong call from reading wild memory. The
// messages are for developers; users meet those of fast_prompt/ops first.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace fast_prompt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
                                   const std::string& activation, const std::string& row_weight, double dropout_p) {
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
  STD_TORCH_CHECK(activation == "relu" || activation == "softmax", "activation: got ", activation);
  STD_TORCH_CHECK(row_weight == "max" || row_weight == "none", "row_weight: got ", row_weight);
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

inline uint32_t dropout_threshold(double dropout_p) {
  return static_cast<uint32_t>(std::fmin(std::nearbyint(dropout_p * 0x1p32), 0xFFFFFFFF));
}

inline float kept_scale(double dropout_p) { return static_cast<float>(1 / (1 - dropout_p)); }

}  // namespace fast_prompt
