// What a launch needs of its caller beside its problem. This header needs no CUDA.

#pragma once

#include "../problem.h"

namespace fast_prompt::cuda {

struct Runtime {
  typedef const char* Status;  // null, or what is wrong

  int device;  // its index
  void* stream;
  void* context;
  // Memory that lives until the stream has passed it.
  void* (*allocate)(void* context, int64_t bytes);
};

}  // namespace fast_prompt::cuda
