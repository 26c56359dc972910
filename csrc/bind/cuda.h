// What runs the CUDA kernels, on a GPU or emulated: their launchers by the activations' type.

#pragma once

#include "../cuda/kernels.h"
#include "library.h"

namespace fast_prompt {
namespace {

struct CudaKernels {
#define FAST_PROMPT_OF_TYPE(op)                              \
  static const auto& op(const Tensor& activations) {         \
    switch (activations.scalar_type()) {                     \
      case ScalarType::BFloat16: return cuda::bfloat16::op;  \
      case ScalarType::Half: return cuda::float16::op;       \
      default: return cuda::float32::op;                     \
    }                                                        \
  }
  FAST_PROMPT_OF_TYPE(prompt_diffusion)
  FAST_PROMPT_OF_TYPE(prompt_compress)
  FAST_PROMPT_OF_TYPE(skip_adapter)
#undef FAST_PROMPT_OF_TYPE

  static ScalarType hidden_type(ScalarType x) { return x; }
};

}  // namespace
}  // namespace fast_prompt
