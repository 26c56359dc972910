// The launchers of every op, one instance per type of the activations: the same source, compiled anew. This header needs
// no CUDA.

#pragma once

#include "../prompt_compress.h"
#include "../prompt_diffusion.h"
#include "../skip_adapter.h"
#include "runtime.h"

namespace fast_prompt::cuda {

namespace float32 {
extern const PromptDiffusionKernels<Runtime> prompt_diffusion;
extern const PromptCompressKernels<Runtime> prompt_compress;
extern const SkipAdapterKernels<Runtime> skip_adapter;
}
namespace bfloat16 {
extern const PromptDiffusionKernels<Runtime> prompt_diffusion;
extern const PromptCompressKernels<Runtime> prompt_compress;
extern const SkipAdapterKernels<Runtime> skip_adapter;
}
namespace float16 {
extern const PromptDiffusionKernels<Runtime> prompt_diffusion;
extern const PromptCompressKernels<Runtime> prompt_compress;
extern const SkipAdapterKernels<Runtime> skip_adapter;
}

}  // namespace fast_prompt::cuda
