// Y = e^s (H + w * (R P)), R = dropout(activation(X K^T)), w = max of each row of R: approximated prompt tuning's
// diffusion step. fast_prompt/reference/prompt_diffusion.py defines it.

#pragma once

#include "runtime.h"

namespace fast_prompt::cpu {

struct PromptDiffusion {
  int64_t rows, width, num_prompts;
  Rows hidden, source;  // H (absent in a backward that needs no gradient of s), X
  Rows prompts, keys;   // P, K [num_prompts, width], of one dtype: the activations' or float32
  float scale;          // e^s
  bool softmax;         // the activation; else ReLU
  bool max_weight;      // else w = 1
  bool dropout;
  uint32_t dropout_threshold;  // elements whose Philox word is below are dropped, the others times kept_scale
  float kept_scale;
  uint64_t seed;
};

// Gradients to write; those not wanted are absent (log_scale: null).
struct PromptDiffusionGradients {
  Rows grad;  // of Y
  Rows hidden, source, prompts, keys;
  float* log_scale;
};

struct PromptDiffusionKernels {
  void (*forward)(const PromptDiffusion&, const Rows& output, const Runtime&);
  void (*backward)(const PromptDiffusion&, const PromptDiffusionGradients&, const Runtime&);
};

// One instance per instruction set: the same source, compiled anew (see isa.h).
namespace portable {
extern const PromptDiffusionKernels prompt_diffusion;
}
namespace avx2 {
extern const PromptDiffusionKernels prompt_diffusion;
}
namespace avx512 {
extern const PromptDiffusionKernels prompt_diffusion;
}
namespace avx512_bf16 {
extern const PromptDiffusionKernels prompt_diffusion;
}

}  // namespace fast_prompt::cpu
