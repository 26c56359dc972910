// Philox 4x32-10 (Salmon et al., SC 2011), as fast_prompt/reference/philox.py defines the dropout masks.

#pragma once

#include "vector.h"

namespace {

// kept[i] = kept_scale where the first Philox word of counter first + i is at least the threshold, else 0. Without
// dropout nothing is written.
inline void dropout_factors(const Dropout& dropout, uint64_t first, int64_t count, float* kept) {
  if (!dropout.seed) return;
  const uint64_t seed = (uint64_t)*dropout.seed;
  for (int64_t start = 0; start < count; start += LANES) {
    const uint64_t base = first + start;
    uint32_t c0[LANES], c1[LANES], c2[LANES] = {}, c3[LANES] = {};
    for (int i = 0; i < LANES; ++i) {
      c0[i] = (uint32_t)base + i;
      c1[i] = (uint32_t)(base >> 32) + (c0[i] < (uint32_t)base);  // the carry
    }
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int i = 0; i < LANES; ++i) {
        const uint64_t product0 = (uint64_t)0xD2511F53 * c0[i];
        const uint64_t product2 = (uint64_t)0xCD9E8D57 * c2[i];
        c0[i] = (uint32_t)(product2 >> 32) ^ c1[i] ^ k0;
        c1[i] = (uint32_t)product2;
        c2[i] = (uint32_t)(product0 >> 32) ^ c3[i] ^ k1;
        c3[i] = (uint32_t)product0;
      }
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    for (int i = 0; i < LANES; ++i) kept[start + i] = c0[i] >= dropout.threshold ? dropout.kept_scale : 0.0f;
  }
}

}  // namespace
