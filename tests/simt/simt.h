// Runs CUDA kernels on a CPU, for tests: blocks one after another, a block's threads as fibers of one CPU thread.
//
// A fiber runs until its next warp operation (shuffle, ldmatrix, mma, __syncwarp) or block barrier. A warp's lanes run
// in turn; when all have come to the same operation it happens, for all at once; lanes that came to different ones, or
// ended, are an error. A warp runs on to the next block barrier before the next warp starts: so whatever one warp has
// not yet written there another one reads as it was, which is NaN at a block's start, and running everything in reverse
// as well shows the races that the first order hides.

#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace simt {

constexpr int WARP = 32;

struct Settings {
  int reverse = 0;           // blocks, warps and lanes from last to first
  int late_copies = 1;       // cp.async moves data when it is waited for; else at once. A real one: any time between.
  int multiprocessors = 2;
  int shared_bytes = 227 << 10;
  int most_blocks = 65535;    // of a grid's second and third dimension
  int most_shared_bytes = 0;  // that a launch has asked for; counted up by launches
};
Settings& settings();

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The stream that the binding gives its launches: one on another would not wait for what the caller has launched.
inline void* callers_stream() { return reinterpret_cast<void*>(0x51); }

// A kernel may then have up to `bytes` of shared memory; without, 48 KiB.
void allow_shared(const void* kernel, int bytes);

// Throws std::runtime_error where CUDA would refuse a launch, or it is not on the caller's stream.
void check_launch(const void* kernel, Dim3 grid, int threads, size_t shared_bytes, const void* stream);

// Runs `kernel` for every thread of every block; throws std::runtime_error that says what went wrong where.
void run(Dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel);

// Of the fiber that runs.
extern Dim3 thread_index, block_index, grid_size;
unsigned char* shared_memory();

// Ends the launch with an error.
[[noreturn]] void fail(const char* message);
void check_shared(const void* address, size_t bytes, size_t alignment, const char* what);

// What a warp does together: `perform` gets every lane's argument, once all have called.
using WarpOperation = void(void* const (&arguments)[WARP]);
void warp(WarpOperation* perform, void* argument, const char* name);
void block_barrier();

// A tensor core's 16 x 8 sums += left [16, depth] * right [depth, 8]; lane l has those of rows l / 4 and l / 4 + 8, and of
// columns l % 4 * 2 and the next. Exact products, their sum rounded once, towards zero: the tensor cores' are no worse.
void multiply(float* const (&sums)[WARP], const float* left, const float* right, int depth);

void copy_async(void* target, const void* source, int bytes, int zeros);
void copy_commit();
void copy_wait(int pending);

}  // namespace simt
