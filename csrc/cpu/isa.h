// Which instruction set the kernels run on. Every kernel file is compiled once per level (setup.py) into the
// namespace of that name; the best level this machine has is chosen by cpuid, once, at run time.

#pragma once

#include <string>
#include <string_view>

#include "../prompt_compress.h"
#include "../prompt_diffusion.h"
#include "../skip_adapter.h"
#include "runtime.h"

namespace fast_prompt::cpu {

namespace portable {
extern const PromptDiffusionKernels<Runtime> prompt_diffusion;
extern const PromptCompressKernels<Runtime> prompt_compress;
extern const SkipAdapterKernels<Runtime> skip_adapter;
}
namespace avx2 {
extern const PromptDiffusionKernels<Runtime> prompt_diffusion;
extern const PromptCompressKernels<Runtime> prompt_compress;
extern const SkipAdapterKernels<Runtime> skip_adapter;
}
namespace avx512 {
extern const PromptDiffusionKernels<Runtime> prompt_diffusion;
extern const PromptCompressKernels<Runtime> prompt_compress;
extern const SkipAdapterKernels<Runtime> skip_adapter;
}
namespace avx512_bf16 {
extern const PromptDiffusionKernels<Runtime> prompt_diffusion;
extern const PromptCompressKernels<Runtime> prompt_compress;
extern const SkipAdapterKernels<Runtime> skip_adapter;
}

struct Level {
  std::string_view name;
  bool (*supported)();
  const PromptDiffusionKernels<Runtime>& prompt_diffusion;
  const PromptCompressKernels<Runtime>& prompt_compress;
  const SkipAdapterKernels<Runtime>& skip_adapter;
};

// The level in use: the best there is, unless the environment variable FAST_PROMPT_CPU_ISA or select() names one.
const Level& level();

// Names of the levels this machine can run, best first, separated by spaces.
std::string supported_levels();

// Uses the named level from now on ("" the best); false if this machine or this build lacks it.
bool select(std::string_view name);

}  // namespace fast_prompt::cpu
