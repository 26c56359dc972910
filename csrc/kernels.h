// Every op's kernels: a new op is a line in each of the two lists here.

#pragma once

#include "prompt_compress.h"
#include "prompt_diffusion.h"
#include "skip_adapter.h"

// Declares what is compiled into the namespace `name` beside a Runtime: the same source, compiled anew for each.
#define FAST_PROMPT_KERNELS_IN(name)                             \
  namespace name {                                               \
  extern const PromptDiffusionKernels<Runtime> prompt_diffusion; \
  extern const PromptCompressKernels<Runtime> prompt_compress;   \
  extern const SkipAdapterKernels<Runtime> skip_adapter;         \
  }

namespace fast_prompt {

// The kernels of one such namespace.
template <class Runtime>
struct AllKernels {
  const PromptDiffusionKernels<Runtime>& prompt_diffusion;
  const PromptCompressKernels<Runtime>& prompt_compress;
  const SkipAdapterKernels<Runtime>& skip_adapter;
};
#define FAST_PROMPT_ALL_KERNELS_OF(name) {name::prompt_diffusion, name::prompt_compress, name::skip_adapter}

}  // namespace fast_prompt
