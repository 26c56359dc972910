// Threads and memory for kernel files, on top of what runtime.h hands them.

#pragma once

#include "vector.h"

namespace {

template <class Body>
void parallel_for(const Runtime& runtime, int64_t jobs, int64_t grain, const Body& body) {
  const auto call = [](const void* context, int64_t begin, int64_t end) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  runtime.parallel_for(jobs, grain, call, &body);
}

template <class Element>
Element* allocate(const Runtime& runtime, int64_t count) {
  return static_cast<Element*>(runtime.allocate(runtime.context, count * sizeof(Element)));
}

inline float* allocate_floats(const Runtime& runtime, int64_t count) { return allocate<float>(runtime, count); }

}  // namespace
