// Launching kernels: what the current device has, scratch memory, callers' matrices as the kernels see them, and the
// first error of several launches.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "runtime.h"
#include "tile.cuh"

namespace fast_prompt::cuda {

// The current device.
struct Device {
  int multiprocessors = 0, shared_bytes = 0;  // shared memory that one block may ask for

  Device() {
    int device = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
};

template <class E>
E* allocate(const Runtime& runtime, int64_t count) {
  return static_cast<E*>(runtime.allocate(runtime.context, count * static_cast<int64_t>(sizeof(E))));
}

template <class E>
E* data_of(const Rows& rows) {
  return reinterpret_cast<E*>(rows.data);
}

template <class E>
Matrix<E> matrix(const Rows& rows) {
  // Batches that follow on one another are one: spares the kernels a division for each row.
  const bool joined = rows.batch_stride == rows.rows_per_batch * rows.row_stride;
  return {data_of<const E>(rows), joined ? INT64_MAX : rows.rows_per_batch, rows.batch_stride, rows.row_stride};
}

template <class E>
Matrix<E> contiguous(const E* data, int64_t rows, int64_t width) {
  return {data, rows, 0, width};
}

// Whether every row begins at a multiple of 16 bytes.
template <class E>
bool is_aligned(const Matrix<E>& matrix) {
  const uintptr_t bytes = reinterpret_cast<uintptr_t>(matrix.data) |
                          static_cast<uintptr_t>(matrix.batch_stride * static_cast<int64_t>(sizeof(E))) |
                          static_cast<uintptr_t>(matrix.row_stride * static_cast<int64_t>(sizeof(E)));
  return bytes % PIECE_BYTES == 0;
}

// Kernels put on one stream, one after another; none after the first that failed.
class Launches {
  cudaStream_t stream;
  cudaError_t status = cudaSuccess;

 public:
  explicit Launches(void* stream) : stream(static_cast<cudaStream_t>(stream)) {}

  template <class... Parameters, class... Arguments>
  void add(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, const Arguments&... arguments) {
    constexpr int64_t WITHOUT_ASKING = 48 << 10;
    if (status == cudaSuccess && shared_bytes > WITHOUT_ASKING)
      status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    status = cudaLaunchKernelEx(&config, kernel, arguments...);
  }

  // Null, or what went wrong.
  const char* error() const { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }
};

}  // namespace fast_prompt::cuda
