// prompt_diffusion on CUDA GPUs, sm_80 and up: see ../prompt_diffusion.h for what it computes. Not yet run on a GPU.
//
// What it costs, for M rows (bf16; e.g. M = 64 * 577, d = 768, on an H100 with 3.0 TB/s and 600 TFLOP/s by mma.sync):
//   forward   bytes 2 M d 3 (read X and H, write Y) = 170 MB, 57 us; operations 4 M p d = 1.8, 7.3, 23 GFLOP for
//             p = 16, 64, 200, which is 3, 12, 38 us. So memory is the floor, and arithmetic has to hide behind it.
//   backward  bytes 2 M d (X, G in, dX, dH out, Y in for ds; X and G again for dP, dK) = 7 M d 2 = 397 MB, 132 us, and
//             8 M p for the coefficients below; operations 10 M p d = 4.5, 18, 57 GFLOP, 8, 30, 95 us.
//
// Forward, one kernel. A block of threads takes tiles of 16 to 128 rows, one after another. First S = X K^T: chunks of
// X and K (128 bytes of each row) come by cp.async into a ring of stages, and S stays in registers, each warp holding
// [16 M, 8 N] of the tile. There the activation, dropout and the row maximum happen (lanes of a row by shuffles, warps
// through a few floats of shared memory), and R goes, rounded, into shared memory, since in the second product every
// warp needs all of its rows. Then, over the same ring, chunks of H and P: Y = e^s (H + w R P), chunk by chunk. The
// ring does not pause between the two, nor between row tiles. So X and H are read once, Y is written once, S and R
// never leave the chip, and P and K come from L2, once for each tile: that is why tiles are tall (128 rows) where p is
// large, and short (16) where there are too few rows to fill the chip.
//
// More prompts than a tile of scores is wide are taken in blocks. The tile of R then holds them all, and softmax's
// shift moves from block to block, as in flash attention.
//
// Backward, three kernels. Row tiles: S again, D = G P^T in registers beside it, then dS, and dX = dS K as above; dH
// and ds = sum(G * Y) from the chunks of G as they pass. Then dP = (e^s w R)^T G and dK = dS^T X, sums over all rows, by
// [prompts, chunk] tiles and splits of the rows; and the splits are added up in order, so that the same call on the
// same card gives the same bits. The row tiles hand the coefficients e^s w R and dS on in scratch memory, [M, p] each:
// to compute them again for every chunk of d would cost d / 64 times the arithmetic, to keep all of dP and dK on chip
// is only possible for p = 16, and they are p / d of the size of X. S itself is not among them.
//
// float32 multiplies as three TF32 products (tile.cuh), not by FFMA: the error is that of float32, the rate about
// twice FFMA's, and the code the same as for the half types. float32 weights beside half activations are rounded to the
// activations' type first; the backward takes what rounding left of them as a second part of every chunk of K and P,
// since the sign of S decides where ReLU has a gradient.
//
// Compiled once per type of the activations, FAST_PROMPT_ELEMENT: float32, bfloat16 or float16.

#include "kernels.h"
#include "prompt_diffusion_call.cuh"
#include "prompt_diffusion_forward.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {
namespace {

using ForwardLaunch = void(const Problem<T>&, T* output, const Device&, Launches&);

template <class L>
void launch_forward(const Problem<T>& problem, T* output, const Device& device, Launches& launches) {
  launches.add(forward_kernel<T, L>, dim3(row_blocks<L>(problem.rows, device)), L::THREADS,
               L::template shared_bytes<T>(problem.num_prompts), problem, output);
}

template <class L>
constexpr Choice<ForwardLaunch> FORWARD = {L::ROWS, L::COLUMNS, L::template shared_bytes<T>, launch_forward<L>};

constexpr Choice<ForwardLaunch> FORWARDS[] = {FORWARD<Wide16>,  FORWARD<Small64>,  FORWARD<Wide64>,
                                              FORWARD<Tall208>, FORWARD<Small256>, FORWARD<Wide256>};

const char* forward(const PromptDiffusion& given, const PromptDiffusionResults& results, const Runtime& runtime) {
  T* const output = data_of<T>(results.output);
  const Device device(runtime);
  Launches launches(runtime.stream);
  Problem<T> problem = describe(given, false, runtime, launches);
  problem.aligned = problem.aligned && reinterpret_cast<uintptr_t>(output) % PIECE_BYTES == 0;
  const auto* choice = choose(FORWARDS, problem.rows, problem.num_prompts, device);
  if (!choice) return TOO_LITTLE_SHARED_MEMORY;
  choice->launch(problem, output, device, launches);
  return launches.error();
}

}  // namespace

extern const PromptDiffusionKernels<Runtime> prompt_diffusion{forward, prompt_diffusion_backward};

}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
