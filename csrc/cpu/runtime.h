// What a CPU kernel sees of the outside world beside its problem: memory and threads.

#pragma once

#include "../problem.h"

namespace fast_prompt::cpu {

struct Runtime {
  typedef void Status;  // nothing goes wrong

  int64_t threads;
  void* context;
  // Memory, 64-byte aligned, that lives until the kernel's caller returns.
  void* (*allocate)(void* context, int64_t bytes);
  // Calls call(body, begin, end) on ranges that cover [0, jobs), in parallel, each of at least `grain` jobs.
  void (*parallel_for)(int64_t jobs, int64_t grain, void (*call)(const void* body, int64_t begin, int64_t end),
                       const void* body);
};

}  // namespace fast_prompt::cpu
