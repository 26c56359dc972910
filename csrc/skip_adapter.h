// Y = X + s W_u dropout(activation(W_d norm(X) + b_d)) + s b_u: a bottleneck adapter in the place of a transformer
// block, a run of them, one for each sample, or a mixture. fast_prompt/reference/skip_adapter.py defines it.

#pragma once

#include "problem.h"

namespace fast_prompt {

enum class SkipNorm : int { NONE, LAYER, RMS, LAYER_AFTER, COUNT };
enum class SkipActivation : int { RELU, SILU, GELU, COUNT };
enum class SkipResidual : int { INPUT, NORMED, NONE, COUNT };

struct SkipAdapter {
  int64_t batch, tokens, width, adapter_width;
  int64_t adapters;              // in a run, or to be chosen from by a route
  int64_t experts, groups;       // of the mixture; 1 and 1 without gates
  Rows x;                        // [batch, tokens, width]
  Rows down_weight;              // [adapters, adapter_width, width]
  Rows up_weight;                // [adapters, width, experts * adapter_width / groups]
  Rows down_bias, up_bias;       // [adapters, adapter_width], [adapters or experts, width]; may be absent
  Rows norm_weight, norm_bias;   // [adapters, width]; may be absent
  const float *scale, *gates;    // [adapters], [batch, experts]; null: 1, no mixture
  const int64_t* route;          // [batch]: each sample's adapter, below 0 for a sample left alone; null: a run
  SkipNorm norm;
  SkipActivation activation;
  SkipResidual residual;
  float eps;
  Dropout dropout;      // of the hidden layer
  Dtype hidden_dtype;  // as which it is kept: x's, or on the CPU float32 for float16, which has too little range
};

// Results to write, contiguous. Rows of samples of a route below 0 are left as they are.
struct SkipAdapterResults {
  Rows output;  // Y
  void* hidden;  // W_d norm(X) + b_d: [adapters or, with a route, 1, batch, tokens, adapter_width]; null: not kept
};

// What the forward kept, and the gradients to write, contiguous; those not wanted are absent (scale, gates: null).
struct SkipAdapterGradients {
  Rows grad;  // of Y
  const void* hidden;
  Rows x, down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias;
  float *scale, *gates;
};

template <class Runtime>
using SkipAdapterKernels = Kernels<SkipAdapter, SkipAdapterResults, SkipAdapterGradients, Runtime>;

}  // namespace fast_prompt
