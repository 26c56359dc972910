// The part of CUDA's runtime and language that csrc/cuda uses, on top of tests/simt/simt.h.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

using dim3 = simt::Dim3;
inline const dim3 &threadIdx = simt::thread_index, &blockIdx = simt::block_index, &gridDim = simt::grid_size;

// ---- What the lanes of a warp and the threads of a block do together ----

inline void __syncthreads() { simt::block_barrier(); }

inline void __syncwarp() {
  simt::warp([](void* const (&)[simt::WARP]) {}, nullptr, "__syncwarp");
}

inline float __shfl_xor_sync(unsigned mask, float value, int lanes) {
  if (mask != 0xFFFFFFFF) simt::fail("only whole warps shuffle here");
  struct Exchange {
    float value, result;
    int lanes;
  } exchange{value, 0, lanes};
  simt::warp(
      [](void* const (&arguments)[simt::WARP]) {
        for (int lane = 0; lane < simt::WARP; ++lane) {
          auto& to = *static_cast<Exchange*>(arguments[lane]);
          to.result = static_cast<const Exchange*>(arguments[lane ^ to.lanes])->value;
        }
      },
      &exchange, "__shfl_xor_sync");
  return exchange.result;
}

// ---- Numbers ----

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// ---- Runtime ----

enum cudaError_t { cudaSuccess = 0 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& settings = simt::settings();
  *value = attribute == cudaDevAttrMultiProcessorCount ? settings.multiprocessors : settings.shared_bytes;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  simt::allow_shared(kernel, bytes);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  simt::check_launch(reinterpret_cast<const void*>(kernel), config->gridDim, static_cast<int>(config->blockDim.x),
                     config->dynamicSmemBytes, config->stream);
  simt::run(config->gridDim, static_cast<int>(config->blockDim.x), config->dynamicSmemBytes,
            [&] { kernel(arguments...); });
  return cudaSuccess;
}
