#include "simt.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

Dim3 thread_index, block_index, grid_size;

namespace {

// ---- Fibers ----

constexpr size_t STACK_BYTES = 128 << 10;

#if defined(__x86_64__)

// Saves the registers that a call must keep and the stack pointer, and takes up those saved at `to`.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

class Context {
  void* stack_pointer = nullptr;

 public:
  void start(unsigned char* stack, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + STACK_BYTES) - 1;  // as a call leaves it: 8 past a multiple of 16
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  void switch_to(Context& other) { simt_switch(&stack_pointer, other.stack_pointer); }
};

#else

class Context {
  ucontext_t context;

 public:
  void start(unsigned char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};

#endif

// ---- Threads of the block that runs ----

enum class State { READY, AT_WARP, AT_BARRIER, ENDED };

struct Copy {
  void* target;
  const void* source;
  int bytes, zeros;

  void perform() const {
    std::memcpy(target, source, bytes);
    std::memset(static_cast<char*>(target) + bytes, 0, zeros);
  }
};

struct Thread {
  Context context;
  State state;
  WarpOperation* operation;
  void* argument;
  const char* name;  // of the operation
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

constexpr int NO_THREAD = -1;  // the scheduler runs, and with it a warp's operation
constexpr size_t CANARY_BYTES = 4096;
constexpr unsigned char POISON = 0xFF;  // NaN in every floating-point type

struct Block {
  int count = 0;
  const std::function<void()>* kernel = nullptr;
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;  // with a canary after its end
  size_t shared_bytes = 0;
  int running = NO_THREAD;
  Context scheduler;
  std::string error;
} block;

unsigned char* stack_of(int thread) {
  static std::vector<unsigned char*> stacks;
  while (static_cast<int>(stacks.size()) <= thread) {
    void* memory =
        mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return stacks[thread];
}

unsigned char* aligned(std::vector<unsigned char>& memory) {
  return memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
}

Thread& self() { return block.threads[block.running]; }

void pause(State state) {
  self().state = state;
  self().context.switch_to(block.scheduler);
}

void thread_main() {
  (*block.kernel)();
  if (!self().open_group.empty() || !self().groups.empty()) fail("a thread ended before its copies did");
  pause(State::ENDED);
}

[[noreturn]] void report(const std::string& message) {
  throw std::runtime_error(message + ", in block (" + std::to_string(block_index.x) + ", " +
                           std::to_string(block_index.y) + ", " + std::to_string(block_index.z) + ")");
}

void resume(int thread) {
  block.running = thread;
  thread_index.x = thread;
  block.scheduler.switch_to(block.threads[thread].context);
  block.running = NO_THREAD;
  if (!block.error.empty()) report(block.error + ", in thread " + std::to_string(thread));
}

std::string describe(const Thread& thread) {
  switch (thread.state) {
    case State::AT_WARP: return thread.name;
    case State::AT_BARRIER: return "a block barrier";
    default: return "its end";
  }
}

// Runs a warp to its next block barrier or its end, and says which.
State run_warp(int first_thread) {
  const auto lane_at = [&](int i) { return first_thread + (settings().reverse ? WARP - 1 - i : i); };
  while (true) {
    for (int i = 0; i < WARP; ++i) resume(lane_at(i));
    const Thread& first = block.threads[first_thread];
    void* arguments[WARP];
    for (int lane = 0; lane < WARP; ++lane) {
      const Thread& thread = block.threads[first_thread + lane];
      if (thread.state != first.state || (first.state == State::AT_WARP && thread.operation != first.operation))
        report("divergent warp: thread " + std::to_string(first_thread) + " has come to " + describe(first) +
               ", thread " + std::to_string(first_thread + lane) + " to " + describe(thread));
      arguments[lane] = thread.argument;
    }
    if (first.state != State::AT_WARP) return first.state;
    first.operation(arguments);
  }
}

void run_block() {
  unsigned char* const shared = aligned(block.shared);
  std::memset(shared, POISON, block.shared_bytes + CANARY_BYTES);
  for (int i = 0; i < block.count; ++i) {
    block.threads[i].open_group.clear();
    block.threads[i].groups.clear();
    block.threads[i].context.start(stack_of(i), thread_main);
  }
  const int warps = block.count / WARP;
  int ended = 0;
  while (ended == 0) {
    for (int i = 0; i < warps; ++i)
      ended += run_warp((settings().reverse ? warps - 1 - i : i) * WARP) == State::ENDED;
  }
  if (ended < warps) report("divergent block: some warps have ended while others wait at a barrier");
  static const std::vector<unsigned char> canary(CANARY_BYTES, POISON);
  if (std::memcmp(shared + block.shared_bytes, canary.data(), CANARY_BYTES) != 0)
    report("shared memory was written beyond its end");
}

float round_towards_zero(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafterf(nearest, 0) : nearest;
}

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

std::map<const void*, size_t>& allowed_shared() {
  static std::map<const void*, size_t> allowed;
  return allowed;
}

void allow_shared(const void* kernel, int bytes) { allowed_shared()[kernel] = bytes; }

void check_launch(const void* kernel, Dim3 grid, int threads, size_t shared_bytes, const void* stream) {
  const auto check = [](bool holds, const char* message) {
    if (!holds) throw std::runtime_error(message);
  };
  const unsigned most = settings().most_blocks;
  check(threads > 0 && threads % WARP == 0 && threads <= 1024, "a block is made of 1 to 32 whole warps");
  check(grid.x > 0 && grid.y > 0 && grid.z > 0, "a grid without blocks");
  check(grid.x <= 0x7FFFFFFF && grid.y <= most && grid.z <= most, "a grid of more blocks than there may be");
  check(shared_bytes <= static_cast<size_t>(settings().shared_bytes), "too much shared memory");
  check(shared_bytes <= std::max(size_t{48} << 10, allowed_shared()[kernel]), "shared memory that was not asked for");
  check(stream == callers_stream(), "a launch that is not on the caller's stream");
}

void run(Dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  settings().most_shared_bytes = std::max(settings().most_shared_bytes, static_cast<int>(shared_bytes));
  grid_size = grid;
  block.count = threads;
  block.kernel = &kernel;
  block.threads.resize(1024);
  block.shared_bytes = shared_bytes;
  block.shared.resize(shared_bytes + CANARY_BYTES + 128);
  block.error.clear();
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned at = settings().reverse ? blocks - 1 - i : i;
    block_index = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
    run_block();
  }
}

unsigned char* shared_memory() { return aligned(block.shared); }

void fail(const char* message) {
  if (block.running == NO_THREAD) report(message);
  block.error = message;
  pause(State::ENDED);
  __builtin_unreachable();
}

void check_shared(const void* address, size_t bytes, size_t alignment, const char* what) {
  const auto* first = static_cast<const unsigned char*>(address);
  const auto* shared = shared_memory();
  if (first < shared || first + bytes > shared + block.shared_bytes) fail(what);
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail("misaligned shared memory address");
}

void warp(WarpOperation* perform, void* argument, const char* name) {
  self().operation = perform;
  self().argument = argument;
  self().name = name;
  pause(State::AT_WARP);
}

void block_barrier() { pause(State::AT_BARRIER); }

void multiply(float* const (&sums)[WARP], const float* left, const float* right, int depth) {
  for (int m = 0; m < 16; ++m) {
    double row[8] = {};
    for (int k = 0; k < depth; ++k)
      for (int n = 0; n < 8; ++n) row[n] += static_cast<double>(left[m * depth + k]) * right[k * 8 + n];
    for (int n = 0; n < 8; ++n) {
      float& sum = sums[m % 8 * 4 + n / 2][m / 8 * 2 + n % 2];
      sum = round_towards_zero(sum + row[n]);
    }
  }
}

void copy_async(void* target, const void* source, int bytes, int zeros) {
  const Copy copy{target, source, bytes, zeros};
  if (settings().late_copies)
    self().open_group.push_back(copy);
  else
    copy.perform();
}

void copy_commit() {
  self().groups.push_back(std::move(self().open_group));
  self().open_group.clear();
}

void copy_wait(int pending) {
  auto& groups = self().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) copy.perform();
    groups.pop_front();
  }
}

}  // namespace simt

// By name, for Python; null if there is none.
extern "C" int* simt_setting(const char* name) {
  auto& all = simt::settings();
  const std::string wanted = name;
  if (wanted == "reverse") return &all.reverse;
  if (wanted == "late_copies") return &all.late_copies;
  if (wanted == "multiprocessors") return &all.multiprocessors;
  if (wanted == "shared_bytes") return &all.shared_bytes;
  if (wanted == "most_blocks") return &all.most_blocks;
  return wanted == "most_shared_bytes" ? &all.most_shared_bytes : nullptr;
}
