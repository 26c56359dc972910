// Multi-head attention of m queries over n visual tokens that are never projected: the absorbed form of
// fast_prompt/reference/prompt_compress.py. This header needs no CUDA.

#pragma once

#include <cstdint>

#include "runtime.h"

namespace fast_prompt::cuda {

// Which tokens are padding, [batch, tokens]; null if none is. Strides in elements.
struct Padding {
  const bool* data;
  int64_t batch_stride, token_stride;
};

struct PromptCompress {
  int64_t batch, queries, tokens, heads, head_width, visual_width;
  Rows query;                     // [batch, queries, heads * head_width]
  Rows visual;                    // [batch, tokens, visual_width]
  Rows key_weight, value_weight;  // [heads * head_width, visual_width]
  const void* value_bias;         // [heads * head_width], or null; of the weights' type
  bool float_weights;             // the weights are float32 whatever the activations are
  Padding padding;
  const int64_t* seed;         // on the device; null without dropout
  uint32_t dropout_threshold;  // elements whose Philox word is below are dropped, the others times kept_scale
  float kept_scale;            // 1 without dropout
};

// Results to write, contiguous. The last two may be null: not kept. Before dropout, probabilities are of each row
// (sample, head, query) over the tokens; attended is the row's weighted sum of tokens.
struct PromptCompressResults {
  void* output;          // [batch, queries, heads * head_width], the activations' type
  float* logsumexp;      // [batch, heads, queries]
  float* probabilities;  // [batch, heads, queries, tokens]
  float* attended;       // [batch, heads, queries, visual_width]
};

// What the forward kept (null: computed again), and the gradients to write, contiguous, null where not wanted; each of
// its input's type.
struct PromptCompressGradients {
  Rows grad;  // of the output
  const float *probabilities, *attended;
  void *query, *visual, *key_weight, *value_weight, *value_bias;
};

// Both return null, or what is wrong. They only launch: errors of the running kernels come later, on the stream.
struct PromptCompressKernels {
  const char* (*forward)(const PromptCompress&, const PromptCompressResults&, const Runtime&);
  const char* (*backward)(const PromptCompress&, const PromptCompressGradients&, const Runtime&);
};

// One instance per type of the activations: the same source, compiled anew.
namespace float32 {
extern const PromptCompressKernels prompt_compress;
}
namespace bfloat16 {
extern const PromptCompressKernels prompt_compress;
}
namespace float16 {
extern const PromptCompressKernels prompt_compress;
}

}  // namespace fast_prompt::cuda
