// What a device's binding registers: every op of fast_prompt, whose schemas are in the declarations of fast_prompt/ops.
// A device is a type with
//   Call(activations)              what surrounds a launch: threads or a stream, scratch memory
//   Call::empty(sizes, type)       a new tensor for a result
//   Call::run(launcher, problem, results)
//   <op>(activations)              the op's kernels
//   hidden_type(type)              as which skip_adapter's hidden layer is kept

#pragma once

#include "prompt_compress.h"
#include "prompt_diffusion.h"
#include "skip_adapter.h"

// `suffix`: of the ops' names, for a device that shares its dispatch key with another.
#define FAST_PROMPT_REGISTER(library, Device, suffix)                                                        \
  library.impl("prompt_diffusion" suffix, TORCH_BOX(&fast_prompt::prompt_diffusion<Device>));                \
  library.impl("prompt_diffusion" suffix "_", TORCH_BOX(&fast_prompt::prompt_diffusion_<Device>));           \
  library.impl("prompt_diffusion_backward" suffix, TORCH_BOX(&fast_prompt::prompt_diffusion_backward<Device>)); \
  library.impl("prompt_compress" suffix, TORCH_BOX(&fast_prompt::prompt_compress<Device>));                  \
  library.impl("prompt_compress_backward" suffix, TORCH_BOX(&fast_prompt::prompt_compress_backward<Device>)); \
  library.impl("skip_adapter" suffix, TORCH_BOX(&fast_prompt::skip_adapter<Device>));                        \
  library.impl("skip_adapter_backward" suffix, TORCH_BOX(&fast_prompt::skip_adapter_backward<Device>))
