#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fast_prompt::cpu {
namespace {

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Level LEVELS[] = {
#if defined(__x86_64__)
    {"avx512_bf16", has_avx512_bf16, FAST_PROMPT_ALL_KERNELS_OF(avx512_bf16)},
    {"avx512", has_avx512, FAST_PROMPT_ALL_KERNELS_OF(avx512)},
    {"avx2", has_avx2, FAST_PROMPT_ALL_KERNELS_OF(avx2)},
#endif
    {"portable", [] { return true; }, FAST_PROMPT_ALL_KERNELS_OF(portable)},
};

const Level* find(std::string_view name) {
  for (const Level& candidate : LEVELS)
    if (candidate.supported() && (name.empty() || name == candidate.name)) return &candidate;
  return nullptr;
}

const Level* first_choice() {
  const char* name = std::getenv("FAST_PROMPT_CPU_ISA");
  const Level* found = find(name ? name : "");
  if (!found)
    throw std::runtime_error("FAST_PROMPT_CPU_ISA: this machine has " + supported_levels() + ", got " + name);
  return found;
}

std::atomic<const Level*> chosen{nullptr};

}  // namespace

const Level& level() {
  if (!chosen.load()) chosen.store(first_choice());
  return *chosen.load();
}

std::string supported_levels() {
  std::string names;
  for (const Level& candidate : LEVELS)
    if (candidate.supported()) names += (names.empty() ? "" : " ") + std::string(candidate.name);
  return names;
}

bool select(std::string_view name) {
  const Level* found = find(name);
  if (found) chosen.store(found);
  return found != nullptr;
}

}  // namespace fast_prompt::cpu
