// One register's worth of floats, at whatever width the compiler was told to build for.
//
// Every kernel file is compiled once per instruction set (see isa.h), so all of this lives in an unnamed
// namespace: no two levels can share a symbol, and the linker cannot put AVX-512 code into the portable
// path. For the same reason kernel files include C headers and intrinsics only, never the C++ library.
// Written in GCC's vector extensions, which clang shares; intrinsics only where an instruction has no other name.

#pragma once

#include <stdint.h>
#include <string.h>

#include "runtime.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using fast_prompt::Dropout;
using fast_prompt::Dtype;
using fast_prompt::Rows;
using fast_prompt::cpu::Runtime;

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

template <class Vector>
inline Vector load_as(const void* source) {
  Vector value;
  memcpy(&value, source, sizeof value);
  return value;
}

template <class Vector>
inline void store_as(void* target, Vector value) {
  memcpy(target, &value, sizeof value);
}

inline Floats load(const float* source) { return load_as<Floats>(source); }
inline void store(float* target, Floats value) { store_as(target, value); }
inline Floats broadcast(float value) { return value - Floats{}; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Added pairwise: short chains, and compilers turn the halving into shuffles.
inline float sum_of_lanes(Floats value) {
  float part[LANES];
  store(part, value);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  return part[0];
}

typedef float FourFloats __attribute__((vector_size(16)));

// The sums of four registers' lanes: of two at a time, within each quarter of a register; then of the quarters.
#if defined(__AVX512F__)
inline FourFloats sums_of_lanes(const Floats* values) {
  const auto add_pairs = [](Floats a, Floats b) {
    return (__m512d)_mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  };
  const __m512d ab = add_pairs(values[0], values[1]), cd = add_pairs(values[2], values[3]);
  const __m512 quarters = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
  const __m256 halves = _mm512_castps512_ps256(quarters) + _mm512_extractf32x8_ps(quarters, 1);
  return (FourFloats)(_mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1));
}
#else
inline FourFloats sum_of_quarters(Floats value) {
  const float* lanes = (const float*)&value;
  FourFloats sum = load_as<FourFloats>(lanes);
  if constexpr (LANES == 8) sum += load_as<FourFloats>(lanes + 4);
  return sum;
}

inline FourFloats sums_of_lanes(const Floats* values) {
  const FourFloats a = sum_of_quarters(values[0]), b = sum_of_quarters(values[1]);
  const FourFloats c = sum_of_quarters(values[2]), d = sum_of_quarters(values[3]);
  const FourFloats ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const FourFloats cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}
#endif

inline float largest_lane(Floats value) {
  float largest = value[0];
  for (int lane = 1; lane < LANES; ++lane) largest = value[lane] > largest ? value[lane] : largest;
  return largest;
}

// exp for arguments <= 0 (the softmax's), relative error below 2e-7; 0 below -87, NaN kept.
// Cephes' reduction and polynomial: exp(x) = 2^n exp(r), |r| <= ln(2) / 2.
inline Floats exp_of_nonpositive(Floats x) {
  const Floats shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504088896341f + shift;
  const Floats n = shifted - shift;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats y = broadcast(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Words power = ((Words)shifted + 127) << 23;  // the low bits of `shifted` hold n
  const Floats result = y * (Floats)power;
  return x < -87.0f ? Floats{} : result;
}

inline Words widened(Halves values) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)values);  // GCC 12 makes six instructions of the line below
#else
  return __builtin_convertvector(values, Words);
#endif
}

// ---- Stores past the cache: nothing is read first, nothing evicted. The target must be aligned to the value. ----

inline void stream_as(void* target, Floats value) {
#if defined(__AVX512F__)
  _mm512_stream_ps((float*)target, (__m512)value);
#elif defined(__AVX2__)
  _mm256_stream_ps((float*)target, (__m256)value);
#else
  store_as(target, value);
#endif
}

inline void stream_as(void* target, Halves value) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)target, (__m256i)value);
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)target, (__m128i)value);
#else
  store_as(target, value);
#endif
}

// Makes this thread's streamed stores visible to others, as every plain store is.
inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// ---- The three ways a number is stored: load, and as_stored, which rounds. Arithmetic is always in Floats. ----

struct Float32 {
  typedef float Element;
  static constexpr Dtype DTYPE = Dtype::FLOAT32;
  static Floats load(const void* source) { return load_as<Floats>(source); }
  static Floats as_stored(Floats value) { return value; }
};

struct BFloat16 {
  typedef uint16_t Element;
  static constexpr Dtype DTYPE = Dtype::BFLOAT16;
  static Floats load(const void* source) { return (Floats)(widened(load_as<Halves>(source)) << 16); }
  // Rounds to nearest even; NaN stays NaN.
  static Halves as_stored(Floats value) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    const Words bits = (Words)value;
    const Words rounded = bits + 0x7FFF + ((bits >> 16) & 1);
    const Words quiet = bits | 0x400000;
    return __builtin_convertvector((value == value ? rounded : quiet) >> 16, Halves);
#endif
  }
};

struct Float16 {
  typedef uint16_t Element;
  static constexpr Dtype DTYPE = Dtype::FLOAT16;
#if defined(__AVX512F__)
  static Floats load(const void* source) { return (Floats)_mm512_cvtph_ps(load_as<__m256i>(source)); }
  static Halves as_stored(Floats value) { return (Halves)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
  static Floats load(const void* source) { return (Floats)_mm256_cvtph_ps(load_as<__m128i>(source)); }
  static Halves as_stored(Floats value) { return (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT); }
#else
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127, subnormals included.
  static Floats load(const void* source) {
    const Words bits = __builtin_convertvector(load_as<Halves>(source), Words);
    const Words magnitude = (bits & 0x7FFF) << 13;
    const Words finite = (Words)((Floats)magnitude * 0x1p112f);
    const Words value = magnitude >= (0x7C00u << 13) ? magnitude | 0x7F800000 : finite;
    return (Floats)(value | (bits & 0x8000) << 16);
  }
  // Normal results round by integer arithmetic; adding 0.5 lines subnormal results up with bit 0.
  static Halves as_stored(Floats value) {
    const Words bits = (Words)value;
    const Words magnitude = bits & 0x7FFFFFFF;
    const Words normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3F000000;
    const Words not_a_number = magnitude > 0x7F800000 ? Words{} + 0x7E00 : Words{} + 0x7C00;
    Words half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477FF000 ? not_a_number : half;  // from 65520 up: infinity, or NaN
    return __builtin_convertvector(half | (bits >> 16 & 0x8000), Halves);
  }
#endif
};

// Calls action with the storage type of a dtype.
template <class Action>
inline auto with_storage(Dtype dtype, Action action) {
  if (dtype == Dtype::FLOAT32) return action(Float32{});
  if (dtype == Dtype::BFLOAT16) return action(BFloat16{});
  return action(Float16{});
}

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::FLOAT32 ? 4 : 2; }

// Element (row, column), rows counted through all batches.
inline char* at(const Rows& rows, int64_t row, int64_t column = 0) {
  const int64_t batch = row / rows.rows_per_batch, index = row % rows.rows_per_batch;
  return rows.data + (batch * rows.batch_stride + index * rows.row_stride + column) * bytes_of(rows.dtype);
}

// The end of a row: fewer elements than lanes. Missing lanes read as 0 and are not written.
template <class Storage>
inline Floats load_some(const void* source, int64_t count) {
  typename Storage::Element buffer[LANES] = {};
  memcpy(buffer, source, count * sizeof buffer[0]);
  return Storage::load(buffer);
}

template <class Storage>
inline void store_some(void* target, Floats value, int64_t count) {
  typename Storage::Element buffer[LANES];
  store_as(buffer, Storage::as_stored(value));
  memcpy(target, buffer, count * sizeof buffer[0]);
}

// A register's worth of a row at `column`, or what is left of the row.
template <class Storage>
inline Floats get(const void* row, int64_t column, int64_t width) {
  const auto* source = (const typename Storage::Element*)row + column;
  return width - column < LANES ? load_some<Storage>(source, width - column) : Storage::load(source);
}

// Writes a register's worth of a row, or what is left of it; `stream` lets full registers go past the cache.
template <class Storage>
inline void put(void* row, int64_t column, Floats value, int64_t width, bool stream) {
  auto* target = (typename Storage::Element*)row + column;
  if (width - column < LANES) {
    store_some<Storage>(target, value, width - column);
  } else if (stream) {
    stream_as(target, Storage::as_stored(value));
  } else {
    store_as(target, Storage::as_stored(value));
  }
}

// A row, one register at a time: action(column, load, store), where load(pointer) and store(pointer, value) take
// the start of a row stored as Storage and touch no element at or beyond `width`.
template <class Storage, class Action>
inline void for_each_vector(int64_t width, Action action) {
  typedef typename Storage::Element Element;
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES)
    action(
        c, [c](const void* row) { return Storage::load((const Element*)row + c); },
        [c](void* row, Floats value) { store_as((Element*)row + c, Storage::as_stored(value)); });
  const int64_t rest = width - c;
  if (rest > 0)
    action(
        c, [c, rest](const void* row) { return load_some<Storage>((const Element*)row + c, rest); },
        [c, rest](void* row, Floats value) { store_some<Storage>((Element*)row + c, value, rest); });
}

// Floats as a row of Storage.
template <class Storage>
inline void write_row(const float* values, int64_t width, void* output) {
  for_each_vector<Storage>(width, [=](int64_t c, auto, auto store_row) { store_row(output, load(values + c)); });
}

}  // namespace
