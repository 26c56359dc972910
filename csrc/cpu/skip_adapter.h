// Y = X + s W_u dropout(activation(W_d norm(X) + b_d)) + s b_u: a bottleneck adapter, a run of them, one for each
// sample, or a mixture. fast_prompt/reference/skip_adapter.py defines it.

#pragma once

#include "runtime.h"

namespace fast_prompt::cpu {

enum class Norm : int { NONE, LAYER, RMS, LAYER_AFTER };
enum class Activation : int { RELU, SILU, GELU };
enum class Residual : int { INPUT, NORMED, NONE };

// How a forward keeps the hidden layer: as X is stored, but that float16 has too little range for it.
inline Dtype hidden_dtype(Dtype x) { return x == Dtype::FLOAT16 ? Dtype::FLOAT32 : x; }

struct SkipAdapter {
  int64_t batch, tokens, width, adapter_width;
  int64_t adapters;                   // in a run, or to be chosen from by a route
  int64_t experts, groups;            // of the mixture; 1 and 1 without gates
  Rows x;                             // [batch, tokens, width]
  Rows down_weight;                   // [adapters, adapter_width, width]
  Rows up_weight;                     // [adapters, width, experts * adapter_width / groups]
  Rows down_bias, up_bias;            // [adapters, adapter_width], [adapters or experts, width]; may be absent
  Rows norm_weight, norm_bias;        // [adapters, width]; may be absent
  const float *scale, *gates;         // [adapters], [batch, experts]; null: 1, no mixture
  const int64_t* route;               // [batch]: each sample's adapter, below 0 for a sample left alone; null: a run
  Norm norm;
  Activation activation;
  Residual residual;
  float eps;
  bool dropout;
  uint32_t dropout_threshold;  // elements whose Philox word is below are dropped, the others times kept_scale
  float kept_scale;
  uint64_t seed;
};

// Gradients to write; those not wanted are absent (scale, gates: null).
struct SkipAdapterGradients {
  Rows grad;  // of Y
  // W_d norm(X) + b_d, of hidden_dtype: [adapters or, with a route, 1, batch, tokens, adapter_width].
  const char* hidden;
  Rows x, down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias;
  float *scale, *gates;
};

struct SkipAdapterKernels {
  void (*forward)(const SkipAdapter&, const Rows& output, char* hidden, const Runtime&);  // hidden: null unless kept
  void (*backward)(const SkipAdapter&, const SkipAdapterGradients&, const Runtime&);
};

// One instance per instruction set: the same source, compiled anew (see isa.h).
namespace portable {
extern const SkipAdapterKernels skip_adapter;
}
namespace avx2 {
extern const SkipAdapterKernels skip_adapter;
}
namespace avx512 {
extern const SkipAdapterKernels skip_adapter;
}
namespace avx512_bf16 {
extern const SkipAdapterKernels skip_adapter;
}

}  // namespace fast_prompt::cpu
