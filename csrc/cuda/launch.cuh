// Launching kernels: what a device has, scratch memory, callers' matrices as the kernels see them, and the
// first error of several launches.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "runtime.h"
#include "tile.cuh"

namespace fast_prompt::cuda {

struct Device {
  int multiprocessors = 0, shared_bytes = 0;  // shared memory that one block may ask for

  // Of the caller's index: this library's own CUDA runtime need not know which device torch has made the current one.
  explicit Device(const Runtime& runtime) {
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, runtime.device);
    cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, runtime.device);
  }
};

// Into how many parts, `most` at most, to split what `blocks` blocks do, of which `slots` run at a time: one round of
// blocks, or two where that leaves clearly fewer slots idle. A last round of a few blocks would cost as much as a full
// one.
inline int64_t count_splits(int64_t blocks, int64_t slots, int64_t most) {
  const int64_t once = std::clamp(slots / blocks, int64_t{1}, most);
  const int64_t twice = std::clamp(2 * slots / blocks, int64_t{1}, most);
  const auto time = [=](int64_t splits) { return static_cast<double>(ceil_div(blocks * splits, slots)) / splits; };
  return time(twice) < 0.9 * time(once) ? twice : once;
}

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
