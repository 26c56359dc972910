// Y = e^s (H + w * (R P)), R = dropout(activation(X K^T)), w = max of each row of R: approximated prompt tuning's
// diffusion step. fast_prompt/reference/prompt_diffusion.py defines it.

#pragma once

#include "problem.h"

namespace fast_prompt {

enum class DiffusionActivation : int { RELU, SOFTMAX, COUNT };
enum class RowWeight : int { MAX, NONE, COUNT };

struct PromptDiffusion {
  int64_t rows, width, num_prompts;
  Rows hidden, source;     // H (absent in a backward), X
  Rows prompts, keys;      // P, K [num_prompts, width], of one dtype: the activations' or float32
  const float* log_scale;  // s, where the activations are
  DiffusionActivation activation;
  RowWeight row_weight;
  Dropout dropout;  // of R
};

struct PromptDiffusionResults {
  Rows output;  // Y; may lie where H does
};

// Gradients to write, contiguous; those not wanted are absent (log_scale: null).
struct PromptDiffusionGradients {
  Rows grad, output;  // of Y, and Y itself, absent where the gradient of s is not wanted
  Rows hidden, source, prompts, keys;
  float* log_scale;
};

template <class Runtime>
using PromptDiffusionKernels = Kernels<PromptDiffusion, PromptDiffusionResults, PromptDiffusionGradients, Runtime>;

}  // namespace fast_prompt
