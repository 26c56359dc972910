// The CPU's binding to PyTorch, and the library's own switches. PyTorch's stable ABI only, so one library serves every
// torch from 2.11 on.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "../cpu/isa.h"
#include "library.h"

namespace fast_prompt {
namespace {

// ---- Memory and threads for one call ----

struct Memory {
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> start;
  int64_t size;
};

// Null where there is none left.
Memory allocate_memory(int64_t bytes) {
  constexpr int64_t LINE = 64;
  const int64_t size = (bytes + LINE - 1) / LINE * LINE;
  return {std::unique_ptr<char, Memory::Free>(static_cast<char*>(std::aligned_alloc(LINE, size))), size};
}

bool poisoned = false;  // whether scratch starts as NaN: a test sees then what is read before it is written

// Memory that calls have given back, for later ones: what the system hands out anew is cleared page by page, which
// takes a small call longer than its arithmetic. One pool for the process: threads that call may be many, and idle.
class Pool {
  static constexpr size_t MOST_BLOCKS = 64;
  std::mutex mutex;
  std::vector<Memory> blocks;  // the smallest first
  int64_t bytes = 0;           // of them all

 public:
  // At width 768 a call takes 1 to 12 MB on two threads, 20 on sixteen: three callers at once, mostly more, find theirs
  // here again. With still more, some pay for new pages.
  static constexpr int64_t MOST_KEPT = 1 << 26;

  Pool() { blocks.reserve(MOST_BLOCKS + 1); }  // give() cannot fail

  // The largest block, or an empty one. Who finds another thread here does without: nobody waits, not even a process
  // that was forked just then.
  Memory take() {
    const std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock || blocks.empty()) return {};
    Memory largest = std::move(blocks.back());
    blocks.pop_back();
    bytes -= largest.size;
    return largest;
  }

  void give(Memory block) {
    const std::unique_lock lock(mutex, std::try_to_lock);
    if (!lock || !block.start) return;
    bytes += block.size;
    const auto smaller = [](const Memory& a, const Memory& b) { return a.size < b.size; };
    blocks.insert(std::upper_bound(blocks.begin(), blocks.end(), block, smaller), std::move(block));
    while (bytes > MOST_KEPT || blocks.size() > MOST_BLOCKS) {
      bytes -= blocks.front().size;
      blocks.erase(blocks.begin());
    }
  }
};

Pool& pool() {
  static Pool& only = *new Pool;  // never destroyed: a thread may still call while the process ends
  return only;
}

// One call's scratch, carved from the pool's memory.
class Workspace {
  std::vector<Memory> blocks;
  int64_t used = 0, taken = 0;  // of the last block; of all

 public:
  Workspace() { blocks.push_back(pool().take()); }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (blocks.size() > 1) {
      blocks.clear();
      // One block, which a later call uses again.
      blocks.push_back(taken <= Pool::MOST_KEPT ? allocate_memory(taken) : Memory{});
    }
    pool().give(std::move(blocks[0]));
  }

  static void* allocate(void* self, int64_t bytes) {
    return static_cast<Workspace*>(self)->take((bytes + 63) / 64 * 64);
  }

 private:
  void* take(int64_t bytes) {
    if (bytes > blocks.back().size - used) {
      blocks.push_back(allocate_memory(bytes));
      STD_TORCH_CHECK(blocks.back().start, "scratch: ", bytes, " bytes of memory are not to be had");
      used = 0;
    }
    void* const start = blocks.back().start.get() + used;
    used += bytes;
    taken += bytes;
    if (poisoned) std::memset(start, 0xFF, bytes);
    return start;
  }
};

struct Cpu {
  class Call {
    Workspace workspace;

    static void parallel_for(int64_t jobs, int64_t grain, void (*call)(const void*, int64_t, int64_t),
                             const void* body) {
      torch::stable::parallel_for(0, jobs, grain, [=](int64_t begin, int64_t end) { call(body, begin, end); });
    }

   public:
    explicit Call(const Tensor&) {}

    Tensor empty(const Sizes& sizes, ScalarType type) { return torch::stable::empty(sizes, type); }

    template <class Launcher, class Problem, class Results>
    void run(Launcher* launcher, const Problem& problem, const Results& results) {
      const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
      launcher(problem, results, cpu::Runtime{threads, &workspace, Workspace::allocate, parallel_for});
    }
  };

  static const auto& prompt_diffusion(const Tensor&) { return cpu::level().kernels.prompt_diffusion; }
  static const auto& prompt_compress(const Tensor&) { return cpu::level().kernels.prompt_compress; }
  static const auto& skip_adapter(const Tensor&) { return cpu::level().kernels.skip_adapter; }

  // float16 is multiplied as float32, and what is kept need not end where float16 does.
  static ScalarType hidden_type(ScalarType x) { return x == ScalarType::Half ? ScalarType::Float : x; }
};

// ---- Instruction sets, and scratch ----

std::string cpu_isa() { return std::string(cpu::level().name); }

std::string cpu_isa_levels() { return cpu::supported_levels(); }

void select_cpu_isa(std::string name) {
  STD_TORCH_CHECK(cpu::select(name), "instruction set: this machine has ", cpu::supported_levels(), ", got ", name);
}

void poison_scratch(bool on) { poisoned = on; }

}  // namespace
}  // namespace fast_prompt

STABLE_TORCH_LIBRARY_IMPL(fast_prompt, CPU, m) { FAST_PROMPT_REGISTER(m, fast_prompt::Cpu, ""); }

STABLE_TORCH_LIBRARY(fast_prompt_native, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_levels() -> str");
  m.def("select_cpu_isa(str name) -> ()");
  m.def("poison_scratch(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fast_prompt_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fast_prompt::cpu_isa));
  m.impl("cpu_isa_levels", TORCH_BOX(&fast_prompt::cpu_isa_levels));
  m.impl("select_cpu_isa", TORCH_BOX(&fast_prompt::select_cpu_isa));
  m.impl("poison_scratch", TORCH_BOX(&fast_prompt::poison_scratch));
}
