// csrc/cuda/ptx.cuh on a CPU: the same functions, with the meaning that the PTX ISA gives the instructions behind them.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fast_prompt::cuda::ptx {

// ---- Shared memory ----

inline unsigned char* dynamic_shared() { return simt::shared_memory(); }

inline void copy_async_16(void* target, const void* source, int bytes) {
  simt::check_shared(target, 16, 16, "cp.async writes outside of shared memory");
  if (bytes < 0 || bytes > 16) simt::fail("cp.async of more or fewer bytes than 0 to 16");
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) simt::fail("misaligned cp.async source");
  simt::copy_async(target, source, bytes, 16 - bytes);
}

inline void copy_commit() { simt::copy_commit(); }

template <int pending>
inline void copy_wait() {
  simt::copy_wait(pending);
}

namespace emulated {

template <int COUNT, bool TRANSPOSED>
void load_matrices(uint32_t (&r)[COUNT], const void* row) {
  struct Load {
    uint32_t* r;
    const uint16_t* row;
  } load{r, static_cast<const uint16_t*>(row)};
  simt::check_shared(row, 16, 16, "ldmatrix reads outside of shared memory");
  simt::warp(
      [](void* const(&arguments)[simt::WARP]) {
        const auto of_lane = [&](int lane) -> const Load& { return *static_cast<const Load*>(arguments[lane]); };
        for (int matrix = 0; matrix < COUNT; ++matrix)
          for (int lane = 0; lane < simt::WARP; ++lane) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
              const int row = lane / 4, column = lane % 4 * 2 + i;
              pair[i] = TRANSPOSED ? of_lane(matrix * 8 + column).row[row] : of_lane(matrix * 8 + row).row[column];
            }
            std::memcpy(&of_lane(lane).r[matrix], pair, sizeof pair);
          }
      },
      &load, TRANSPOSED ? "ldmatrix.trans" : "ldmatrix");
}

// d += a b, of what the lanes hold in their fragments.
template <int DEPTH, class SumsOf, class LeftAt, class RightAt>
void multiply(SumsOf sums_of, LeftAt left_at, RightAt right_at) {
  float left[16 * DEPTH], right[DEPTH * 8], *sums[simt::WARP];
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < DEPTH; ++k) left[m * DEPTH + k] = left_at(m, k);
  for (int k = 0; k < DEPTH; ++k)
    for (int n = 0; n < 8; ++n) right[k * 8 + n] = right_at(k, n);
  for (int lane = 0; lane < simt::WARP; ++lane) sums[lane] = sums_of(lane);
  simt::multiply(sums, left, right, DEPTH);
}

template <class T>
float half_of(uint32_t pair, int i) {
  T halves[2];
  std::memcpy(halves, &pair, sizeof pair);
  if constexpr (std::is_same_v<T, __half>)
    return __half2float(halves[i]);
  else
    return __bfloat162float(halves[i]);
}

template <class T>
void multiply_halves(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* name) {
  struct Product {
    float* d;
    const uint32_t *a, *b;
  } product{d, a, b};
  simt::warp(
      [](void* const(&arguments)[simt::WARP]) {
        const auto of_lane = [&](int lane) -> const Product& { return *static_cast<const Product*>(arguments[lane]); };
        multiply<16>(
            [&](int lane) { return of_lane(lane).d; },
            [&](int m, int k) {
              return half_of<T>(of_lane(m % 8 * 4 + k % 8 / 2).a[m / 8 + k / 8 * 2], k % 2);
            },
            [&](int k, int n) { return half_of<T>(of_lane(n * 4 + k % 8 / 2).b[k / 8], k % 2); });
      },
      &product, name);
}

}  // namespace emulated

inline void load_matrices(uint32_t (&r)[4], const void* row) { emulated::load_matrices<4, false>(r, row); }
inline void load_matrices(uint32_t (&r)[2], const void* row) { emulated::load_matrices<2, false>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulated::load_matrices<4, true>(r, row); }
inline void load_matrices_transposed(uint32_t (&r)[2], const void* row) { emulated::load_matrices<2, true>(r, row); }

// ---- Tensor cores ----

inline void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::multiply_halves<__nv_bfloat16>(d, a, b, "mma.m16n8k16 of bf16");
}

inline void multiply_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::multiply_halves<__half>(d, a, b, "mma.m16n8k16 of fp16");
}

inline void multiply_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  struct Product {
    float* d;
    const float *a, *b;
  } product{d, a, b};
  const auto cut = [](float x) { return __uint_as_float(__float_as_uint(x) & 0xFFFFE000); };
  const float cut_a[4] = {cut(a[0]), cut(a[1]), cut(a[2]), cut(a[3])}, cut_b[2] = {cut(b[0]), cut(b[1])};
  product.a = cut_a;
  product.b = cut_b;
  simt::warp(
      [](void* const(&arguments)[simt::WARP]) {
        const auto of_lane = [&](int lane) -> const Product& { return *static_cast<const Product*>(arguments[lane]); };
        emulated::multiply<8>(
            [&](int lane) { return of_lane(lane).d; },
            [&](int m, int k) { return of_lane(m % 8 * 4 + k % 4).a[m / 8 + k / 4 * 2]; },
            [&](int k, int n) { return of_lane(n * 4 + k % 4).b[k / 4]; });
      },
      &product, "mma.m16n8k8 of tf32");
}

// ---- Numbers ----

inline float round_to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  return finite ? __uint_as_float((bits + 0x1000) & 0xFFFFE000) : x;
}

inline float max_or_nan(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }

}  // namespace fast_prompt::cuda::ptx
