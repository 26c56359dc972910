// What every binding is made of: checks that keep a wrong call from reading wild memory, tensors as the kernels see
// them, results. PyTorch's stable ABI only. The messages are for developers; users meet those of fast_prompt/ops first.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "../problem.h"

namespace fast_prompt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

// Options come by number: torch's stable ABI makes a new string of every `str` argument and never frees it. Their order
// is that of the op's declaration in fast_prompt/ops; COUNT says how many there are.
template <class Option>
Option option(const char* name, int64_t number) {
  constexpr auto count = static_cast<int64_t>(Option::COUNT);
  STD_TORCH_CHECK(0 <= number && number < count, name, ": expected a number from 0 to ", count - 1, ", got ", number);
  return static_cast<Option>(number);
}

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// ---- Checks ----

inline void check_sizes(const Tensor& tensor, const char* name, const Sizes& expected) {
  STD_TORCH_CHECK(sizes_of(tensor) == expected, name, ": wrong size");
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(tensor.is_cpu() == other.is_cpu() && tensor.get_device_index() == other.get_device_index(), name,
                  ": expected the device of the activations");
}

// A row, a matrix or a batch of matrices of a type that there are kernels for.
inline void check_rows(const Tensor& tensor, const char* name) {
  const int64_t rank = tensor.dim();
  STD_TORCH_CHECK(1 <= rank && rank <= 3, name, ": expected a row, a matrix or a batch of matrices, got rank ", rank);
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  ": expected float32, bfloat16 or float16");
}

// Activations: rows [tokens, width], or a batch of them, not empty.
inline void check_activations(const Tensor& tensor, const char* name) {
  check_rows(tensor, name);
  STD_TORCH_CHECK(tensor.dim() > 1 && tensor.numel() > 0, name, ": expected [..., tokens, width], not empty");
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& other) {
  check_sizes(tensor, name, sizes_of(other));
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, ": expected the dtype of the activations");
  check_device(tensor, name, other);
}

// The first of an op's parameters: of the activations' dtype, or float32.
inline void check_weight(const Tensor& tensor, const char* name, const Sizes& sizes, const Tensor& activations) {
  check_rows(tensor, name);
  check_sizes(tensor, name, sizes);
  STD_TORCH_CHECK(tensor.scalar_type() == activations.scalar_type() || tensor.scalar_type() == ScalarType::Float, name,
                  ": expected the dtype of the activations, or float32");
  check_device(tensor, name, activations);
}

// Another: of the first one's dtype.
inline void check_parameter(const OptionalTensor& tensor, const char* name, const Sizes& sizes, const Tensor& first) {
  if (!tensor) return;
  check_rows(*tensor, name);
  check_sizes(*tensor, name, sizes);
  STD_TORCH_CHECK(tensor->scalar_type() == first.scalar_type(), name, ": expected the dtype of the op's first weight");
  check_device(*tensor, name, first);
}

inline void check_contiguous(const OptionalTensor& tensor, const char* name, ScalarType type, const Sizes& sizes,
                             const Tensor& activations) {
  if (!tensor) return;
  check_sizes(*tensor, name, sizes);
  STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->is_contiguous(), name,
                  ": expected a contiguous tensor of another dtype or layout");
  check_device(*tensor, name, activations);
}

// One float32, of any shape.
inline void check_number(const Tensor& tensor, const char* name, const Tensor& activations) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.numel() == 1, name, ": expected one float32");
  check_device(tensor, name, activations);
}

// ---- Tensors as the kernels see them ----

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return Dtype::BFLOAT16;
    case ScalarType::Half: return Dtype::FLOAT16;
    default: return Dtype::FLOAT32;
  }
}

// The tensor, or a copy where a row's elements are not neighbours.
inline Tensor side_by_side(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return last < 0 || tensor.size(last) == 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor side_by_side(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(side_by_side(*tensor)) : std::nullopt;
}

inline Rows rows_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t rank = sizes.size();
  char* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  if (rank == 1) return {data, dtype_of(tensor), 1, 0, 0};
  return {data, dtype_of(tensor), sizes[rank - 2], rank == 3 ? strides[0] : 0, strides[rank - 2]};
}

inline Rows rows_of(const OptionalTensor& tensor) { return tensor ? rows_of(*tensor) : Rows{}; }

inline float* floats_of(const OptionalTensor& tensor) {
  return tensor ? const_cast<float*>(tensor->const_data_ptr<float>()) : nullptr;
}

inline int64_t samples_of(const Tensor& activations) { return activations.dim() == 3 ? activations.size(0) : 1; }

inline Dropout dropout_of(const OptionalTensor& seed, double dropout_p, const Tensor& activations) {
  if (dropout_p == 0) return {nullptr, 0, 1};
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                  "seed: dropout needs an int64 scalar");
  check_device(*seed, "seed", activations);
  const auto threshold = static_cast<uint32_t>(std::fmin(std::nearbyint(dropout_p * 0x1p32), 0xFFFFFFFF));
  return {seed->const_data_ptr<int64_t>(), threshold, static_cast<float>(1 / (1 - dropout_p))};
}

// ---- Results ----

// The gradients that are needed, in the order they were asked for.
template <class Call>
class Gradients {
  Call& call;
  const std::vector<bool>& needs;
  size_t asked = 0;

 public:
  std::vector<Tensor> tensors;

  Gradients(Call& call, const std::vector<bool>& needs, size_t count) : call(call), needs(needs) {
    STD_TORCH_CHECK(needs.size() == count, "needs: expected ", count, " flags");
  }

  // A new contiguous tensor for the next argument's gradient; absent if that is not needed.
  Rows next(const OptionalTensor& like) {
    if (!needs[asked++]) return {};
    STD_TORCH_CHECK(like, "needs: there is no argument ", asked - 1);
    tensors.push_back(call.empty(sizes_of(*like), like->scalar_type()));
    return rows_of(tensors.back().dim() ? tensors.back() : torch::stable::reshape(tensors.back(), {1}));
  }

  float* next_floats(const OptionalTensor& like) { return reinterpret_cast<float*>(next(like).data); }

  // Of an argument that changes nothing.
  void next_zeros(const OptionalTensor& like) {
    if (next(like).data) torch::stable::zero_(tensors.back());
  }
};

// ---- Samples of a batch, by torch itself ----

// target[samples[i]] = source[i].
inline void copy_samples(const Tensor& target, const Tensor& samples, const Tensor& source) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(target), from(int64_t{0}), from(samples), from(source)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_copy_", "", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the result's reference
}

inline Tensor select_samples(const Tensor& source, const Tensor& samples) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(source), from(int64_t{0}), from(samples)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::index_select", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// target[..., samples, ...] = 0, along a dimension.
inline void clear_samples(const Tensor& target, int64_t dimension, const Tensor& samples) {
  using torch::stable::detail::from;
  const Tensor zero = torch::stable::new_zeros(target, {});
  std::array<StableIValue, 4> stack{from(target), from(dimension), from(samples), from(zero)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::index_fill_", "int_Tensor", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace
}  // namespace fast_prompt
