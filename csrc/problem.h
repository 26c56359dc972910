// What every op's problem is made of, with no word of torch: tensors as plain rows, and dropout. Data only: an inline
// function here would be compiled once per instruction set and merged by the linker.

#pragma once

#include <stdint.h>

namespace fast_prompt {

enum class Dtype : int { FLOAT32, BFLOAT16, FLOAT16 };

// [batch, rows, width]; any strides (in elements) but the last, which is 1. A matrix is a single batch.
struct Rows {
  char* data;  // null: absent
  Dtype dtype;
  int64_t rows_per_batch, batch_stride, row_stride;
};

struct Dropout {
  const int64_t* seed;  // where the activations are; null: nothing is dropped
  uint32_t threshold;   // elements whose Philox word is below are dropped,
  float kept_scale;     // the others times this: 1 without dropout
};

// What a device has for an op, in one type of the activations or for one instruction set. A launcher returns null or
// what is wrong: on a GPU it only launches, and errors of the running kernels come later, on the stream.
template <class Problem, class Results, class Gradients, class Runtime>
struct Kernels {
  typename Runtime::Status (*forward)(const Problem&, const Results&, const Runtime&);
  typename Runtime::Status (*backward)(const Problem&, const Gradients&, const Runtime&);
};

}  // namespace fast_prompt
