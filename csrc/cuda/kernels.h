// The launchers of every op, one instance per type of the activations. This header needs no CUDA.

#pragma once

#include "../kernels.h"
#include "runtime.h"

namespace fast_prompt::cuda {

FAST_PROMPT_KERNELS_IN(float32)
FAST_PROMPT_KERNELS_IN(bfloat16)
FAST_PROMPT_KERNELS_IN(float16)

}  // namespace fast_prompt::cuda
