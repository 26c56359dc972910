// What harness.py calls, by ctypes: the launchers of the emulated kernels, whatever op they are of.

#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "runtime.h"
#include "simt.h"

namespace {

// Scratch memory full of NaN.
class Scratch {
  std::vector<std::unique_ptr<unsigned char[]>> blocks;

  static void* allocate(void* self, int64_t bytes) {
    auto& blocks = static_cast<Scratch*>(self)->blocks;
    blocks.push_back(std::make_unique<unsigned char[]>(bytes + 16));
    std::memset(blocks.back().get(), 0xFF, bytes + 16);
    return blocks.back().get();
  }

 public:
  fast_prompt::cuda::Runtime runtime() { return {nullptr, this, allocate}; }
};

}  // namespace

extern "C" {

simt::Settings* simt_settings() { return &simt::settings(); }

// Every launcher takes what to compute, where to and its runtime; a reference is passed as a pointer is. Returns null,
// or what is wrong, until the next call.
using Launcher = const char*(const void* problem, void* results, const fast_prompt::cuda::Runtime* runtime);

const char* simt_call(Launcher* launcher, const void* problem, void* results) {
  static std::string error;
  Scratch scratch;
  const auto runtime = scratch.runtime();
  try {
    return launcher(problem, results, &runtime);
  } catch (const std::exception& thrown) {
    error = thrown.what();
    return error.c_str();
  }
}
}
