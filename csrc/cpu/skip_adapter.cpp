// skip_adapter on the CPU, forward and backward: see ../skip_adapter.h for what it computes.
//
// Rows are cut into one part per thread, parts into tiles. A tile is carried through every step, and in a run through
// every adapter, while its rows are in cache: x is read once and y written once. Forward, for each adapter: z as words;
// h = z W_d^T; t in its place; a register block at a time, y = s (t W_u^T + b_u) + x. A few rows take another way:
// skip_adapter_few_rows.h. Backward: skip_adapter_backward.h. Where samples differ in their weights, by a route or by
// gates, no tile holds rows of two; a mixture's experts are added up, by the sample's gates, to one up projection.
// Samples that a route leaves alone are not among the rows.
//
// bf16 activations on a machine with bf16 dot products are multiplied as bf16 (z, t and their gradients are rounded to
// it); everything else is widened to float32. The sums are float32 in both cases.

#include "../skip_adapter.h"

#include "skip_adapter_backward.h"
#include "skip_adapter_few_rows.h"
#include "skip_adapter_steps.h"

namespace fast_prompt::cpu::FAST_PROMPT_ISA {
namespace {

// h of the tile's rows, kept where it is wanted.
template <class Dot>
void project_down(const Call& call, const Adapter& adapter, const Operand& z, int64_t hidden_row, int64_t count,
                  char* hidden, const Ahead& ahead, const Tile& tile) {
  const int64_t width = call.problem.adapter_width;
  multiply_in_slices<Dot>({count, packed_columns(width), words<Dot>(call.problem.width), z.words, z.stride,
                               adapter.down, tile.hidden, tile.tall, false, ahead});
  finish_hidden(call, adapter, hidden_row, count, hidden, tile);
}

template <class Dot>
void forward_block(const Call& call, const Adapter* adapters, const Rows& output, char* hidden, const Block& block,
                   const Tile& tile) {
  const SkipAdapter& problem = call.problem;
  const int64_t first = problem.route ? problem.route[block.sample] : 0;
  const int64_t count = problem.route ? 1 : problem.adapters;
  const int64_t next = block.first + block.count, ahead = smaller(block.count, call.all_rows() - next);
  // The next tile's rows, both halves at a time.
  const Ahead halves_ahead =
      rows_ahead(problem.x, next, problem.x, next + ahead / 2, (ahead + 1) / 2, problem.width);
  Span x{problem.x, block.first, 0};
  for (int64_t i = 0; i < count; ++i) {
    const Adapter& adapter = adapters[first + i];
    const Span y = i + 1 < count ? tile.span(tile.between) : Span{output, block.first, call.all_rows()};
    const int64_t hidden_row = i * call.all_rows() + block.first;
    const Operand z = norm_rows<Dot>(call, adapter, x, block.count, tile);
    const Ahead wanted = i == 0 ? halves_ahead : Ahead{};
    project_down<Dot>(call, adapter, z, hidden_row, block.count, hidden, wanted, tile);
    activate_rows(call, hidden_row, block.count, tile, nullptr);
    write_results<Dot>(call, adapter, x, y, block.count, tile);
    x = y;
  }
}

template <class Dot>
void forward_with(const SkipAdapter& problem, const Rows& output, char* hidden, const Runtime& runtime) {
  const Call call = make_call(problem, runtime);
  if (call.rows() == 0) return;
  if (has_few_rows<Dot>(call)) return forward_few_rows<Dot>(call, output, hidden);
  const Forms forms{true, true, false, false};
  const Adapter* adapters = prepare_adapters<Dot>(call, forms);
  const Run runs = split_rows(runtime, call.rows(), rows_worth_a_thread(call));
  const int64_t rows = tile_rows(call), floats = make_tile(call, rows, false, nullptr).floats;
  float* scratch = allocate_floats(runtime, runs.count * floats);
  Mixture* mixtures = allocate<Mixture>(runtime, runs.count);
  for (int64_t run = 0; run < runs.count; ++run) mixtures[run] = allocate_mixture<Dot>(call, forms);
  parallel_for(runtime, runs.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t run = begin; run < end; ++run) {
      const Tile tile = make_tile(call, rows, false, scratch + run * floats);
      int64_t mixed = -1;
      Adapter own;
      for_each_block(call, run * runs.rows, smaller(call.rows(), (run + 1) * runs.rows), [&](const Block& block) {
        if (problem.gates && mixed != block.sample) {
          mixed = block.sample;
          own = mix<Dot>(call, adapters[0], mixed, mixtures[run]);
        }
        forward_block<Dot>(call, problem.gates ? &own : adapters, output, hidden, block, tile);
      });
    }
    finish_streams();
  });
}

// ---- The way in ----

// Calls action with how rows are multiplied.
template <class Action>
void with_dot([[maybe_unused]] const SkipAdapter& problem, Action action) {
#if defined(__AVX512BF16__)
  if (problem.x.dtype == Dtype::BFLOAT16) return action(Bf16Pairs{});
#endif
  action(Fp32{});
}

void forward(const SkipAdapter& problem, const SkipAdapterResults& results, const Runtime& runtime) {
  with_dot(problem, [&](auto dot) {
    forward_with<decltype(dot)>(problem, results.output, (char*)results.hidden, runtime);
  });
}

void backward(const SkipAdapter& problem, const SkipAdapterGradients& gradients, const Runtime& runtime) {
  with_dot(problem, [&](auto dot) { backward_with<decltype(dot)>(problem, gradients, runtime); });
}

}  // namespace

extern const SkipAdapterKernels<Runtime> skip_adapter{forward, backward};

}  // namespace fast_prompt::cpu::FAST_PROMPT_ISA
