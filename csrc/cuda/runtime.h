// What the launchers of every op take: matrices in device memory, a stream, scratch memory. This header needs no CUDA.

#pragma once

#include <cstdint>

namespace fast_prompt::cuda {

// Rows in device memory, elements of a row side by side; strides in elements. A batch of matrices is numbered through.
struct Rows {
  void* data;
  int64_t rows_per_batch, batch_stride, row_stride;
};

// What a launch needs of its caller: a stream, and scratch memory that lives until the stream has passed it.
struct Runtime {
  void* stream;
  void* context;
  void* (*allocate)(void* context, int64_t bytes);
};

}  // namespace fast_prompt::cuda
