// y = residual + s W_u dropout(activation(W_d norm(x) + b_d)) + b_u, a bottleneck adapter in the place of a transformer
// block; fast_prompt/reference/skip_adapter.py defines it, with runs of adapters, routes and mixtures of experts. This
// header needs no CUDA.

#pragma once

#include <cstdint>

#include "runtime.h"

namespace fast_prompt::cuda {

// In the order of the reference's tables.
enum class SkipNorm { none, layer, rms, layer_after };
enum class SkipActivation { relu, silu, gelu };
enum class SkipResidual { input, normed, none };

struct SkipAdapter {
  int64_t batch, rows, width, hidden_width, adapters;  // rows of a sample
  int64_t experts, groups;                             // both 1 without gates
  Rows x;                                              // [batch, rows, width]
  Rows down_weight;             // [adapters, hidden_width, width]
  Rows up_weight;               // [adapters, width, hidden_width]; with gates [1, width, experts * a group's columns]
  Rows down_bias;               // [adapters, hidden_width]; this and all that follow are null where not given
  Rows up_bias;                 // [adapters, width]; [experts, width] with gates
  Rows norm_weight, norm_bias;  // [adapters, width]
  bool float_weights;           // the parameters are float32 whatever the activations are
  const float* scale;           // [adapters], on the device as all that follow
  const float* gates;           // [batch, experts], contiguous
  const int64_t* route;         // [batch]
  const int64_t* seed;          // null without dropout
  SkipNorm norm;
  SkipActivation activation;
  SkipResidual residual;
  float eps;
  uint32_t dropout_threshold;  // elements whose Philox word is below are dropped, the others times kept_scale
  float kept_scale;            // 1 without dropout
};

// Results to write, contiguous, of the activations' type. Rows of samples of route -1 are left as they are.
struct SkipAdapterResults {
  void* output;  // [batch, rows, width]
  void* hidden;  // [adapters, batch, rows, hidden_width], one adapter's with a route; null: not kept
};

// What the forward kept, and the gradients to write, contiguous, null where not wanted; each of its input's type.
struct SkipAdapterGradients {
  Rows grad;  // of the output
  const void* hidden;
  void *x, *down_weight, *up_weight, *down_bias, *up_bias, *norm_weight, *norm_bias;
  float *scale, *gates;
};

// Both return null, or what is wrong. They only launch: errors of the running kernels come later, on the stream.
struct SkipAdapterKernels {
  const char* (*forward)(const SkipAdapter&, const SkipAdapterResults&, const Runtime&);
  const char* (*backward)(const SkipAdapter&, const SkipAdapterGradients&, const Runtime&);
};

// One instance per type of the activations: the same source, compiled anew.
namespace float32 {
extern const SkipAdapterKernels skip_adapter;
}
namespace bfloat16 {
extern const SkipAdapterKernels skip_adapter;
}
namespace float16 {
extern const SkipAdapterKernels skip_adapter;
}

}  // namespace fast_prompt::cuda
