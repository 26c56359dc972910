// Which instruction set the kernels run on. Every kernel file is compiled once per level (setup.py) into the
// namespace of that name; the best level this machine has is chosen by cpuid, once, at run time.

#pragma once

#include <string>
#include <string_view>

#include "../kernels.h"
#include "runtime.h"

namespace fast_prompt::cpu {

FAST_PROMPT_KERNELS_IN(portable)
FAST_PROMPT_KERNELS_IN(avx2)
FAST_PROMPT_KERNELS_IN(avx512)
FAST_PROMPT_KERNELS_IN(avx512_bf16)

struct Level {
  std::string_view name;
  bool (*supported)();
  AllKernels<Runtime> kernels;
};

// The level in use: the best there is, unless the environment variable FAST_PROMPT_CPU_ISA or select() names one.
const Level& level();

// Names of the levels this machine can run, best first, separated by spaces.
std::string supported_levels();

// Uses the named level from now on ("" the best); false if this machine or this build lacks it.
bool select(std::string_view name);

}  // namespace fast_prompt::cpu
