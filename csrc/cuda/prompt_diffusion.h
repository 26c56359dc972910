// Y = e^s (H + w * (R P)), R = dropout(activation(X K^T)), w = max of each row of R: approximated prompt tuning's
// diffusion step. fast_prompt/reference/prompt_diffusion.py defines it. This header needs no CUDA.

#pragma once

#include <cstdint>

#include "runtime.h"

namespace fast_prompt::cuda {

struct PromptDiffusion {
  int64_t rows, width, num_prompts;
  Rows hidden, source;     // H (absent in a backward that needs no gradient of s), X
  Rows prompts, keys;      // P, K [num_prompts, width]
  bool float_weights;      // P and K are float32 whatever the activations are
  const float* log_scale;  // s, on the device
  const int64_t* seed;     // on the device; null without dropout
  bool softmax;            // the activation; else ReLU
  bool max_weight;         // else w = 1
  uint32_t dropout_threshold;  // elements whose Philox word is below are dropped, the others times kept_scale
  float kept_scale;            // 1 without dropout
};

// Gradients to write, contiguous; null where not wanted. Those of P and K have the weights' type.
struct PromptDiffusionGradients {
  Rows grad;  // of Y
  void *hidden, *source, *prompts, *keys;
  float* log_scale;
};

// Both return null, or what is wrong. They only launch: errors of the running kernels come later, on the stream.
struct PromptDiffusionKernels {
  const char* (*forward)(const PromptDiffusion&, void* output, const Runtime&);
  const char* (*backward)(const PromptDiffusion&, const PromptDiffusionGradients&, const Runtime&);
};

// One instance per type of the activations: the same source, compiled anew.
namespace float32 {
extern const PromptDiffusionKernels prompt_diffusion;
}
namespace bfloat16 {
extern const PromptDiffusionKernels prompt_diffusion;
}
namespace float16 {
extern const PromptDiffusionKernels prompt_diffusion;
}

}  // namespace fast_prompt::cuda
