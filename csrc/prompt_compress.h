// Multi-head attention of m queries over n visual tokens that are never projected: the absorbed form of
// fast_prompt/reference/prompt_compress.py.

#pragma once

#include "problem.h"

namespace fast_prompt {

// Which tokens are padding, [batch, tokens]; null if none is. Strides in elements.
struct Padding {
  const bool* data;
  int64_t batch_stride, token_stride;
};

struct PromptCompress {
  int64_t batch, queries, tokens, heads, head_width, visual_width;
  Rows query, visual;             // [batch, queries, heads * head_width], [batch, tokens, visual_width]
  Rows key_weight, value_weight;  // [heads * head_width, visual_width], of one dtype: the activations' or float32
  Rows value_bias;                // one row, of the weights' dtype; may be absent
  Padding padding;
  Dropout dropout;  // of the probabilities
};

// What a forward leaves to its backward, contiguous: [batch, heads, queries] and, unless null, by tokens and by
// visual_width: the probabilities before dropout, and the weighted tokens.
struct PromptCompressKept {
  float *logsumexp, *probabilities, *attended;
};

struct PromptCompressResults {
  Rows output;  // [batch, queries, heads * head_width]
  PromptCompressKept kept;
};

// What the forward kept (null: computed again), and the gradients to write, contiguous; those not wanted are absent.
struct PromptCompressGradients {
  Rows grad;  // of the output
  PromptCompressKept kept;
  Rows query, visual, key_weight, value_weight, value_bias;
};

template <class Runtime>
using PromptCompressKernels = Kernels<PromptCompress, PromptCompressResults, PromptCompressGradients, Runtime>;

}  // namespace fast_prompt
