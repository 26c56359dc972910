// What a kernel sees of the outside world, with no word of torch: tensors as plain rows, memory, threads.
// Data only: an inline function here would be compiled once per instruction set and merged by the linker.

#pragma once

#include <stdint.h>

namespace fast_prompt::cpu {

enum class Dtype : int { FLOAT32, BFLOAT16, FLOAT16 };

// [batch, rows, width]; any strides (in elements) but the last, which is 1. A matrix is a single batch.
struct Rows {
  char* data;  // null: absent
  Dtype dtype;
  int64_t rows_per_batch, batch_stride, row_stride;
};

struct Runtime {
  int64_t threads;
  void* context;
  // Memory, 64-byte aligned, that lives until the kernel's caller returns.
  void* (*allocate)(void* context, int64_t bytes);
  // Calls call(body, begin, end) on ranges that cover [0, jobs), in parallel, each of at least `grain` jobs.
  void (*parallel_for)(int64_t jobs, int64_t grain, void (*call)(const void* body, int64_t begin, int64_t end),
                       const void* body);
};

}  // namespace fast_prompt::cpu
