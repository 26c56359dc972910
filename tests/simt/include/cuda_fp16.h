#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float x) : value(static_cast<_Float16>(x)) {}
};

inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return __half(x); }
