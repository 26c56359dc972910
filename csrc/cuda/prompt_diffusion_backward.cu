// The backward of prompt_diffusion; prompt_diffusion.cu says how its work is laid out. Compiled once per type of the
// activations, as the forward is.

#include "prompt_diffusion_backward.cuh"

#include "prompt_diffusion_call.cuh"

namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT {
namespace {

using RowsLaunch = void(const Problem<T>&, const RowGradients<T>&, const Device&, Launches&);

template <class L>
void launch_rows(const Problem<T>& problem, const RowGradients<T>& gradients, const Device& device,
                 Launches& launches) {
  launches.add(backward_rows_kernel<T, L>, dim3(row_blocks<L>(problem.rows, device)), L::THREADS,
               L::template shared_bytes<T>(problem.num_prompts), problem, gradients);
}

template <class L>
constexpr Choice<RowsLaunch> BACKWARD = {L::ROWS, L::COLUMNS, L::template shared_bytes<T>, launch_rows<L>};

constexpr Choice<RowsLaunch> BACKWARDS[] = {BACKWARD<Wide16>, BACKWARD<Small64>, BACKWARD<Both64>,
                                            BACKWARD<Both208>, BACKWARD<Small256>};

// dP and dK, of which every multiprocessor runs two blocks at a time.
template <class L>
void launch_weight_gradients(WeightGradients<T>& all, int wanted, int64_t splits_of, Launches& launches) {
  const int64_t chunks = ceil_div(all.width, CHUNK<T>), tiles = ceil_div(all.num_prompts, L::PROMPTS) * chunks;
  launches.add(weight_gradients_kernel<T, L>,
               dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(splits_of), static_cast<unsigned>(wanted)),
               L::THREADS, L::shared_bytes(), all);
}

using Weights16 = WeightLayout<T, 1, 4, 1>;
using Weights64 = WeightLayout<T, 4, 1, 1>;
using Weights128 = WeightLayout<T, 4, 2, 2>;

int64_t splits_of_rows(const WeightGradients<T>& all, int wanted, const Device& device) {
  const int64_t prompts = all.num_prompts <= 16 ? 16 : all.num_prompts <= 64 ? 64 : 128;
  const int64_t tiles = ceil_div(all.num_prompts, prompts) * ceil_div(all.width, CHUNK<T>) * wanted;
  return count_splits(tiles, 2 * device.multiprocessors, ceil_div(all.rows, SPLIT_STEP));
}

template <class W>
void reduce(const WeightGradients<T>& all, void* const (&results)[2], int wanted, int64_t splits,
            const float* log_scale_parts, int64_t row_tiles, float* log_scale, Launches& launches) {
  Reduction<W> reduction{};
  for (int i = 0; i < wanted; ++i) {
    reduction.parts[i] = all.wanted[i].parts;
    reduction.results[i] = static_cast<W*>(results[i]);
  }
  reduction.wanted = wanted;
  reduction.splits = static_cast<int>(splits);
  reduction.elements = int64_t{all.num_prompts} * all.width;
  reduction.log_scale_parts = log_scale_parts;
  reduction.row_tiles = row_tiles;
  reduction.log_scale = log_scale;
  const int64_t blocks = wanted ? ceil_div(reduction.elements, REDUCTION_THREADS) : 1;
  launches.add(reduce_kernel<W>, dim3(static_cast<unsigned>(blocks), wanted + (log_scale ? 1 : 0)), REDUCTION_THREADS,
               log_scale ? REDUCTION_THREADS * sizeof(double) : 0, reduction);
}

}  // namespace

const char* prompt_diffusion_backward(const PromptDiffusion& given, const PromptDiffusionGradients& gradients,
                                      const Runtime& runtime) {
  const Device device(runtime);
  Launches launches(runtime.stream);
  Problem<T> problem = describe(given, true, runtime, launches);
  const auto* choice = choose(BACKWARDS, problem.rows, problem.num_prompts, device);
  if (!choice) return TOO_LITTLE_SHARED_MEMORY;

  const int64_t row_tiles = ceil_div(problem.rows, choice->rows);
  RowGradients<T> rows{};
  rows.grad = matrix<T>(gradients.grad);
  rows.hidden = data_of<T>(gradients.hidden);
  rows.source = data_of<T>(gradients.source);
  rows.output = matrix<T>(gradients.output);
  rows.coefficient_pitch = static_cast<int>(ceil_div(problem.num_prompts, 8) * 8);
  if (gradients.log_scale) rows.log_scale = allocate<float>(runtime, row_tiles);
  problem.aligned = problem.aligned && is_aligned(rows.grad) && is_aligned(rows.output) && is_aligned(contiguous(rows.hidden, 0, 0)) &&
                    is_aligned(contiguous(rows.source, 0, 0));

  // The gradients of P and K that are wanted: their coefficients, and what these multiply.
  struct Wanted {
    void* result;
    T** coefficients;
    float** units;
    const Matrix<T>& activations;
  };
  const Wanted candidates[] = {{gradients.prompts.data, &rows.prompt_coefficients, &rows.prompt_units, rows.grad},
                               {gradients.keys.data, &rows.key_coefficients, &rows.key_units, problem.source}};
  WeightGradients<T> weights{};
  void* results[2] = {};
  int wanted = 0;
  for (const Wanted& candidate : candidates) {
    if (!candidate.result) continue;
    *candidate.coefficients = allocate<T>(runtime, problem.rows * rows.coefficient_pitch);
    *candidate.units = allocate<float>(runtime, row_tiles);
    weights.wanted[wanted] = {contiguous<T>(*candidate.coefficients, problem.rows, rows.coefficient_pitch),
                              candidate.activations, *candidate.units, nullptr};
    results[wanted++] = candidate.result;
  }
  choice->launch(problem, rows, device, launches);
  if (!wanted && !gradients.log_scale) return launches.error();

  weights.rows = problem.rows;
  weights.unit_rows = choice->rows;
  weights.width = problem.width;
  weights.num_prompts = problem.num_prompts;
  weights.aligned = problem.aligned;
  int64_t splits = 0;
  if (wanted) {
    splits = splits_of_rows(weights, wanted, device);
    weights.split_rows = ceil_div(ceil_div(problem.rows, splits), SPLIT_STEP) * SPLIT_STEP;
    splits = ceil_div(problem.rows, weights.split_rows);
    for (int i = 0; i < wanted; ++i)
      weights.wanted[i].parts = allocate<float>(runtime, splits * problem.num_prompts * problem.width);
    if (problem.num_prompts <= 16)
      launch_weight_gradients<Weights16>(weights, wanted, splits, launches);
    else if (problem.num_prompts <= 64)
      launch_weight_gradients<Weights64>(weights, wanted, splits, launches);
    else
      launch_weight_gradients<Weights128>(weights, wanted, splits, launches);
  }
  if (given.prompts.dtype == Dtype::FLOAT32)
    reduce<float>(weights, results, wanted, splits, rows.log_scale, row_tiles, gradients.log_scale, launches);
  else
    reduce<T>(weights, results, wanted, splits, rows.log_scale, row_tiles, gradients.log_scale, launches);
  return launches.error();
}

}  // namespace fast_prompt::cuda::FAST_PROMPT_ELEMENT
