// What skip_adapter does to one row: norms and activations, and their derivatives. Rows are floats, read and written up
// to their width and no further.

#pragma once

#include <math.h>

#include "../skip_adapter.h"
#include "vector.h"

namespace fast_prompt::cpu::FAST_PROMPT_ISA {
namespace {

// The row as floats: where it lies, or copied.
const float* as_floats(Dtype dtype, const void* row, int64_t width, float* copy) {
  if (dtype == Dtype::FLOAT32) return (const float*)row;
  with_storage(dtype, [=](auto storage) {
    for_each_vector<decltype(storage)>(width, [=](int64_t c, auto load_row, auto) { store(copy + c, load_row(row)); });
  });
  return copy;
}

// All bits of the first `count` lanes.
inline Ints first_lanes(int64_t count) {
  Ints lanes;
  for (int lane = 0; lane < LANES; ++lane) lanes[lane] = lane < count ? -1 : 0;
  return lanes;
}

// The sum over a row of value(c, load): in four chains, so that no addition waits for the one before.
template <class Value>
float sum_row(int64_t width, Value value) {
  Floats sums[4] = {};
  int64_t c = 0;
  const auto add = [&](Floats& sum) __attribute__((always_inline)) {
    sum += value(c, [c](const float* row) { return load(row + c); });
    c += LANES;
  };
  while (c + 4 * LANES <= width)
#pragma GCC unroll 4
    for (Floats& sum : sums) add(sum);
  while (c + LANES <= width) add(sums[0]);
  if (const int64_t rest = width - c; rest > 0) {
    const Ints inside = first_lanes(rest);
    const Floats last = value(c, [c, rest](const float* row) { return load_some<Float32>(row + c, rest); });
    sums[1] += inside ? last : Floats{};
  }
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// ---- Norms ----

struct Moments {
  float mean, factor;
};

Floats normed(Floats x, const Moments& of, Floats weight, Floats bias) {
  return (x - of.mean) * of.factor * weight + bias;
}

// The mean is summed about the row's first element: a row of one value has exactly that for its mean, where the factor,
// 1 / sqrt(eps), would make much of any error.
Moments moments(const float* row, int64_t width, bool rms, float eps) {
  const float first = row[0];
  const float mean =
      rms ? 0.0f : first + sum_row(width, [=](int64_t, auto load_row) { return load_row(row) - first; }) / (float)width;
  const float square = sum_row(width, [=](int64_t, auto load_row) {
    const Floats centred = load_row(row) - mean;
    return centred * centred;
  });
  return {mean, 1.0f / sqrtf(square / (float)width + eps)};
}

constexpr int NORM_ROWS = 4;  // normed together, so that no row waits for the sums of another

// moments() of NORM_ROWS rows, stored as In.
template <class In>
void moments_of_rows(const char* const* rows, int64_t width, bool rms, float eps, Moments* of) {
  const auto sum_rows = [=](const auto& value) __attribute__((always_inline)) {
    const auto row_at = [=](int i, int64_t c) { return (const typename In::Element*)rows[i] + c; };
    Floats sums[NORM_ROWS] = {};
    int64_t c = 0;
    for (; c + LANES <= width; c += LANES)
#pragma GCC unroll 4
      for (int i = 0; i < NORM_ROWS; ++i) sums[i] += value(i, In::load(row_at(i, c)));
    if (const int64_t rest = width - c; rest > 0) {
      const Ints inside = first_lanes(rest);
      for (int i = 0; i < NORM_ROWS; ++i) sums[i] += inside ? value(i, load_some<In>(row_at(i, c), rest)) : Floats{};
    }
    return sums_of_lanes(sums);
  };
  FourFloats mean = {};
  if (!rms) {
    for (int i = 0; i < NORM_ROWS; ++i) mean[i] = load_some<In>(rows[i], 1)[0];
    mean += sum_rows([=](int i, Floats x) { return x - mean[i]; }) / (float)width;
  }
  const FourFloats square = sum_rows([=](int i, Floats x) { return (x - mean[i]) * (x - mean[i]); });
  for (int i = 0; i < NORM_ROWS; ++i) of[i] = {mean[i], 1.0f / sqrtf(square[i] / (float)width + eps)};
}

// The gradient of a norm's input from that of its result, a register at a time to action(column, value); adds the row's
// part to the gradients of weight and bias, unless they are null. `weight` is filled up to a register.
template <class Action>
void norm_backward(const float* row, const Moments& of, bool rms, const float* weight, const float* grad,
                   int64_t width, float* weight_sums, float* bias_sums, Action action) {
  Floats sum = {}, product = {};
  for_each_vector<Float32>(width, [&](int64_t c, auto load_row, auto store_row) __attribute__((always_inline)) {
    const Floats g = load_row(grad), normed = (load_row(row) - of.mean) * of.factor, weighted = g * load(weight + c);
    sum += weighted;
    product += weighted * normed;
    if (weight_sums) store_row(weight_sums, load_row(weight_sums) + g * normed);
    if (bias_sums) store_row(bias_sums, load_row(bias_sums) + g);
  });
  const float mean = rms ? 0.0f : sum_of_lanes(sum) / (float)width, along = sum_of_lanes(product) / (float)width;
  for_each_vector<Float32>(width, [&](int64_t c, auto load_row, auto) __attribute__((always_inline)) {
    const Floats normed = (load_row(row) - of.mean) * of.factor;
    action(c, (load_row(grad) * load(weight + c) - mean - normed * along) * of.factor);
  });
}

// ---- Activations: their value, and their slope ----

struct Activated {
  Floats value, slope;
};

struct Relu {
  static Activated at(Floats h) {
    const Floats one = broadcast(1.0f);
    return {h < 0.0f ? Floats{} : h, h <= 0.0f ? Floats{} : one};  // keeps NaN
  }
};

inline Floats magnitude(Floats value) { return (Floats)((Words)value & 0x7FFFFFFF); }

struct Silu {
  static Activated at(Floats h) {
    const Floats power = exp_of_nonpositive(-magnitude(h)), inverse = 1.0f / (1.0f + power);
    const Floats sigmoid = h < 0.0f ? power * inverse : inverse;
    return {h * sigmoid, sigmoid * (1.0f + h * (1.0f - sigmoid))};
  }
};

// erfc as in Abramowitz and Stegun, 7.1.26: to 1.5e-7.
struct Gelu {
  static Activated at(Floats h) {
    const Floats power = exp_of_nonpositive(h * h * -0.5f);
    const Floats t = 1.0f / (1.0f + magnitude(h) * (0.3275911f * 0.70710678f));
    Floats tail = t * 1.061405429f - 1.453152027f;
    tail = tail * t + 1.421413741f;
    tail = tail * t - 0.284496736f;
    tail = tail * t + 0.254829592f;
    tail = tail * t * power * 0.5f;  // of the normal distribution, beyond |h|
    const Floats below = h < 0.0f ? tail : 1.0f - tail;
    return {h * below, below + h * power * 0.39894228f};
  }
};

// Calls action with the activation.
template <class Action>
void with_activation(SkipActivation activation, Action action) {
  if (activation == SkipActivation::RELU) return action(Relu{});
  if (activation == SkipActivation::SILU) return action(Silu{});
  action(Gelu{});
}

}  // namespace
}  // namespace fast_prompt::cpu::FAST_PROMPT_ISA
