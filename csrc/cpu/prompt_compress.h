// Multi-head attention of m queries over n tokens with the keys and values never formed: the queries are folded through
// W_k, the weighted tokens taken through W_v. fast_prompt/reference/prompt_compress.py defines it.

#pragma once

#include "runtime.h"

namespace fast_prompt::cpu {

struct PromptCompress {
  int64_t batch, queries, tokens, heads, head_width, token_width;
  Rows query, visual;             // [batch, queries, heads * head_width], [batch, tokens, token_width]
  Rows key_weight, value_weight;  // [heads * head_width, token_width], of one dtype: the activations' or float32
  Rows value_bias;                // one row, of the weights' dtype; may be absent
  const bool* padding;            // [batch, tokens], true where a token is none; null: there is no padding
  int64_t padding_strides[2];
  bool dropout;
  uint32_t dropout_threshold;  // weights whose Philox word is below are dropped, the others times kept_scale
  float kept_scale;
  uint64_t seed;
};

// What a forward leaves to its backward, contiguous: [batch, heads, queries] and, unless null, by tokens and by
// token_width: the probabilities before dropout, and the weighted tokens.
struct PromptCompressKept {
  float *logsumexp, *probabilities, *attended;
};

// Gradients to write; those not wanted are absent.
struct PromptCompressGradients {
  Rows grad;  // of the output
  Rows query, visual, key_weight, value_weight, value_bias;
};

struct PromptCompressKernels {
  void (*forward)(const PromptCompress&, const PromptCompressKept&, const Rows& output, const Runtime&);
  void (*backward)(const PromptCompress&, const PromptCompressKept&, const PromptCompressGradients&, const Runtime&);
};

// One instance per instruction set: the same source, compiled anew (see isa.h).
namespace portable {
extern const PromptCompressKernels prompt_compress;
}
namespace avx2 {
extern const PromptCompressKernels prompt_compress;
}
namespace avx512 {
extern const PromptCompressKernels prompt_compress;
}
namespace avx512_bf16 {
extern const PromptCompressKernels prompt_compress;
}

}  // namespace fast_prompt::cpu
