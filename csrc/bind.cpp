// The compiled library's binding to PyTorch: checks tensors, hands the kernels plain pointers, returns tensors.
// PyTorch's stable ABI only, so one library serves every torch from 2.11 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "cpu/isa.h"
#include "cpu/prompt_compress.h"
#include "cpu/prompt_diffusion.h"
#include "cpu/skip_adapter.h"

namespace fast_prompt {
namespace {

// ---- Tensors as the kernels see them ----

cpu::Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return cpu::Dtype::BFLOAT16;
    case ScalarType::Half: return cpu::Dtype::FLOAT16;
    default: return cpu::Dtype::FLOAT32;
  }
}

cpu::Rows rows_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t rank = sizes.size();
  char* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  if (rank == 1) return {data, dtype_of(tensor), 1, 0, 0};
  return {data, dtype_of(tensor), sizes[rank - 2], rank == 3 ? strides[0] : 0, strides[rank - 2]};
}

Tensor contiguous_like(const Tensor& tensor) {
  return torch::stable::empty(tensor.sizes(), tensor.scalar_type());
}

template <class Problem>
void set_dropout(Problem& problem, const std::optional<Tensor>& seed, double dropout_p) {
  problem.dropout = dropout_p > 0;
  if (!problem.dropout) return;
  problem.dropout_threshold = dropout_threshold(dropout_p);
  problem.kept_scale = kept_scale(dropout_p);
  problem.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
}

// The gradients that are needed, in the order they were asked for.
struct Results {
  std::vector<Tensor> tensors;

  cpu::Rows like(const Tensor& tensor, bool needed) {
    if (!needed) return {};
    tensors.push_back(contiguous_like(tensor));
    return rows_of(tensors.back());
  }
};

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

void parallel_for(int64_t jobs, int64_t grain, void (*call)(const void*, int64_t, int64_t), const void* body) {
  torch::stable::parallel_for(0, jobs, grain, [=](int64_t begin, int64_t end) { call(body, begin, end); });
}

cpu::Runtime runtime(Workspace& workspace) {
  return {static_cast<int64_t>(torch::stable::get_num_threads()), &workspace, Workspace::allocate, parallel_for};
}

// ---- prompt_diffusion ----

cpu::PromptDiffusion prompt_diffusion_problem(const std::optional<Tensor>& hidden, const Tensor& source,
                                              const Tensor& prompts, const Tensor& keys, const Tensor& log_scale,
                                              const std::optional<Tensor>& seed, int64_t activation,
                                              int64_t row_weight, double dropout_p) {
  check_prompt_diffusion(hidden, source, prompts, keys, log_scale, seed, dropout_p);
  cpu::PromptDiffusion problem{};
  problem.rows = source.sizes()[0] * source.sizes()[1];
  problem.width = source.sizes()[2];
  problem.num_prompts = prompts.sizes()[0];
  problem.source = rows_of(source);
  if (hidden) problem.hidden = rows_of(*hidden);
  problem.prompts = rows_of(prompts);
  problem.keys = rows_of(keys);
  problem.scale = std::exp(*log_scale.const_data_ptr<float>());
  problem.softmax = option<DiffusionActivation>("activation", activation) == DiffusionActivation::SOFTMAX;
  problem.max_weight = option<RowWeight>("row_weight", row_weight) == RowWeight::MAX;
  set_dropout(problem, seed, dropout_p);
  return problem;
}

Tensor prompt_diffusion(Tensor hidden, Tensor source, Tensor prompts, Tensor keys, Tensor log_scale,
                        std::optional<Tensor> seed, int64_t activation, int64_t row_weight, double dropout_p) {
  const auto problem = prompt_diffusion_problem(hidden, source, prompts, keys, log_scale, seed, activation,
                                                row_weight, dropout_p);
  Tensor output = contiguous_like(source);
  Workspace workspace;
  cpu::level().prompt_diffusion.forward(problem, rows_of(output), runtime(workspace));
  return output;
}

// The gradients that are needed, in the order of the flags.
std::vector<Tensor> prompt_diffusion_backward(Tensor grad, std::optional<Tensor> hidden, Tensor source,
                                              Tensor prompts, Tensor keys, Tensor log_scale,
                                              std::optional<Tensor> seed, int64_t activation, int64_t row_weight,
                                              double dropout_p, bool needs_hidden, bool needs_source,
                                              bool needs_prompts, bool needs_keys, bool needs_log_scale) {
  const auto problem = prompt_diffusion_problem(hidden, source, prompts, keys, log_scale, seed, activation,
                                                row_weight, dropout_p);
  STD_TORCH_CHECK(hidden || !needs_log_scale, "hidden: needed for the gradient of log_scale");
  check_activations(grad, "grad", source);

  Results results;
  cpu::PromptDiffusionGradients gradients{};
  gradients.grad = rows_of(grad);
  gradients.hidden = results.like(source, needs_hidden);
  gradients.source = results.like(source, needs_source);
  gradients.prompts = results.like(prompts, needs_prompts);
  gradients.keys = results.like(keys, needs_keys);
  if (needs_log_scale) {
    results.tensors.push_back(contiguous_like(log_scale));
    gradients.log_scale = results.tensors.back().mutable_data_ptr<float>();
  }
  Workspace workspace;
  cpu::level().prompt_diffusion.backward(problem, gradients, runtime(workspace));
  return results.tensors;
}

// ---- prompt_compress ----

cpu::PromptCompress prompt_compress_problem(const Tensor& query, const Tensor& visual, const Tensor& key_weight,
                                            const Tensor& value_weight, const std::optional<Tensor>& value_bias,
                                            const std::optional<Tensor>& key_padding_mask,
                                            const std::optional<Tensor>& seed, int64_t num_heads, double dropout_p) {
  check_prompt_compress(query, visual, key_weight, value_weight, value_bias, key_padding_mask, seed, num_heads,
                        dropout_p);
  cpu::PromptCompress problem{};
  problem.batch = query.sizes()[0];
  problem.queries = query.sizes()[1];
  problem.tokens = visual.sizes()[1];
  problem.heads = num_heads;
  problem.head_width = query.sizes()[2] / num_heads;
  problem.token_width = visual.sizes()[2];
  problem.query = rows_of(query);
  problem.visual = rows_of(visual);
  problem.key_weight = rows_of(key_weight);
  problem.value_weight = rows_of(value_weight);
  if (value_bias) problem.value_bias = rows_of(*value_bias);
  if (key_padding_mask) {
    problem.padding = key_padding_mask->const_data_ptr<bool>();
    problem.padding_strides[0] = key_padding_mask->strides()[0];
    problem.padding_strides[1] = key_padding_mask->strides()[1];
  }
  set_dropout(problem, seed, dropout_p);
  return problem;
}

// The output, the logarithms of the sums of exponentials, then what is to be kept besides.
std::vector<Tensor> prompt_compress(Tensor query, Tensor visual, Tensor key_weight, Tensor value_weight,
                                    std::optional<Tensor> value_bias, std::optional<Tensor> key_padding_mask,
                                    std::optional<Tensor> seed, int64_t num_heads, double dropout_p,
                                    bool keep_probabilities, bool keep_attended) {
  const auto problem = prompt_compress_problem(query, visual, key_weight, value_weight, value_bias, key_padding_mask,
                                               seed, num_heads, dropout_p);
  std::vector<Tensor> results{contiguous_like(query)};
  const auto by_row = [&](bool wanted, std::vector<int64_t> last) -> float* {
    if (!wanted) return nullptr;
    std::vector<int64_t> sizes{problem.batch, problem.heads, problem.queries};
    sizes.insert(sizes.end(), last.begin(), last.end());
    results.push_back(torch::stable::empty(sizes, ScalarType::Float));
    return results.back().mutable_data_ptr<float>();
  };
  const cpu::PromptCompressKept kept{by_row(true, {}), by_row(keep_probabilities, {problem.tokens}),
                                     by_row(keep_attended, {problem.token_width})};
  Workspace workspace;
  cpu::level().prompt_compress.forward(problem, kept, rows_of(results[0]), runtime(workspace));
  return results;
}

// The gradients that are needed, in the order of the flags.
std::vector<Tensor> prompt_compress_backward(Tensor grad, Tensor query, Tensor visual, Tensor key_weight,
                                             Tensor value_weight, std::optional<Tensor> value_bias,
                                             std::optional<Tensor> key_padding_mask, std::optional<Tensor> seed,
                                             int64_t num_heads, double dropout_p, Tensor logsumexp,
                                             std::optional<Tensor> probabilities, std::optional<Tensor> attended,
                                             bool needs_query, bool needs_visual, bool needs_key_weight,
                                             bool needs_value_weight, bool needs_value_bias) {
  const auto problem = prompt_compress_problem(query, visual, key_weight, value_weight, value_bias, key_padding_mask,
                                               seed, num_heads, dropout_p);
  check_activations(grad, "grad", query);
  STD_TORCH_CHECK(value_bias || !needs_value_bias, "value_bias: needed for its gradient");
  check_kept(logsumexp, "logsumexp", query, num_heads, std::nullopt);
  if (probabilities) check_kept(*probabilities, "probabilities", query, num_heads, problem.tokens);
  if (attended) check_kept(*attended, "attended", query, num_heads, problem.token_width);
  const auto floats = [](const std::optional<Tensor>& tensor) {
    return tensor ? const_cast<float*>(tensor->const_data_ptr<float>()) : nullptr;
  };
  Results results;
  cpu::PromptCompressGradients gradients{};
  gradients.grad = rows_of(grad);
  gradients.query = results.like(query, needs_query);
  gradients.visual = results.like(visual, needs_visual);
  gradients.key_weight = results.like(key_weight, needs_key_weight);
  gradients.value_weight = results.like(value_weight, needs_value_weight);
  if (needs_value_bias) gradients.value_bias = results.like(*value_bias, true);
  Workspace workspace;
  cpu::level().prompt_compress.backward(problem, {floats(logsumexp), floats(probabilities), floats(attended)},
                                        gradients, runtime(workspace));
  return results.tensors;
}

// ---- skip_adapter ----

cpu::SkipAdapter skip_adapter_problem(const SkipAdapterInputs& in, double eps) {
  check_skip_adapter(in);
  const auto rows = [](const std::optional<Tensor>& tensor) { return tensor ? rows_of(*tensor) : cpu::Rows{}; };
  const auto floats = [](const std::optional<Tensor>& tensor) {
    return tensor ? tensor->const_data_ptr<float>() : nullptr;
  };
  cpu::SkipAdapter problem{};
  problem.batch = in.batch();
  problem.tokens = in.tokens();
  problem.width = in.width();
  problem.adapter_width = in.adapter_width();
  problem.adapters = in.adapters();
  problem.experts = in.experts();
  problem.groups = in.groups();
  problem.x = rows_of(in.x);
  problem.down_weight = rows_of(in.down_weight);
  problem.up_weight = rows_of(in.up_weight);
  problem.down_bias = rows(in.down_bias);
  problem.up_bias = rows(in.up_bias);
  problem.norm_weight = rows(in.norm_weight);
  problem.norm_bias = rows(in.norm_bias);
  problem.scale = floats(in.scale);
  problem.gates = floats(in.gates);
  if (in.route) {
    problem.route = in.route->const_data_ptr<int64_t>();
    STD_TORCH_CHECK(std::all_of(problem.route, problem.route + problem.batch,
                                [&](int64_t adapter) { return adapter < problem.adapters; }),
                    "route: there are ", problem.adapters, " adapters");
  }
  problem.norm = static_cast<cpu::Norm>(in.options.norm);
  problem.activation = static_cast<cpu::Activation>(in.options.activation);
  problem.residual = static_cast<cpu::Residual>(in.options.residual);
  problem.eps = static_cast<float>(eps);
  set_dropout(problem, in.seed, in.dropout_p);
  return problem;
}

// The type of the hidden layer that a forward keeps.
ScalarType hidden_type(const Tensor& x) {
  return cpu::hidden_dtype(dtype_of(x)) == cpu::Dtype::FLOAT32 ? ScalarType::Float : x.scalar_type();
}

// Writes `output`; returns the hidden layer, if it is to be kept.
std::vector<Tensor> skip_adapter(Tensor output, Tensor x, Tensor down_weight, Tensor up_weight,
                                 std::optional<Tensor> down_bias, std::optional<Tensor> up_bias,
                                 std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                                 std::optional<Tensor> scale, std::optional<Tensor> gates, std::optional<Tensor> route,
                                 std::optional<Tensor> seed, int64_t norm, int64_t activation, int64_t residual,
                                 double eps, double dropout_p, bool keep_hidden) {
  const SkipOptions options(norm, activation, residual);
  const SkipAdapterInputs in{x,     down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, scale,
                             gates, route,       seed,      options,   dropout_p};
  const auto problem = skip_adapter_problem(in, eps);
  check_contiguous(output, "output", x.scalar_type(), {in.batch(), in.tokens(), in.width()}, x);
  std::vector<Tensor> kept;
  if (keep_hidden) kept.push_back(torch::stable::empty(in.hidden_sizes(), hidden_type(x)));
  Workspace workspace;
  cpu::level().skip_adapter.forward(problem, rows_of(output),
                                    keep_hidden ? static_cast<char*>(kept[0].data_ptr()) : nullptr,
                                    runtime(workspace));
  return kept;
}

// The gradients that are needed, in the order of `needs`: x, down_weight, up_weight, down_bias, up_bias, norm_weight,
// norm_bias, scale, gates.
std::vector<Tensor> skip_adapter_backward(Tensor grad, Tensor x, Tensor down_weight, Tensor up_weight,
                                          std::optional<Tensor> down_bias, std::optional<Tensor> up_bias,
                                          std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                                          std::optional<Tensor> scale, std::optional<Tensor> gates,
                                          std::optional<Tensor> route, std::optional<Tensor> seed, Tensor hidden,
                                          int64_t norm, int64_t activation, int64_t residual, double eps,
                                          double dropout_p, std::vector<bool> needs) {
  const SkipOptions options(norm, activation, residual);
  const SkipAdapterInputs in{x,     down_weight, up_weight, down_bias, up_bias, norm_weight, norm_bias, scale,
                             gates, route,       seed,      options,   dropout_p};
  const auto problem = skip_adapter_problem(in, eps);
  check_skip_adapter_backward(in, grad, hidden, hidden_type(x), needs);
  Results results;
  const auto optional = [&](const std::optional<Tensor>& tensor, bool needed) {
    return needed ? results.like(*tensor, true) : cpu::Rows{};
  };
  const auto floats = [&](const std::optional<Tensor>& tensor, bool needed) {
    return reinterpret_cast<float*>(optional(tensor, needed).data);
  };
  cpu::SkipAdapterGradients gradients{};
  gradients.grad = rows_of(grad);
  gradients.hidden = static_cast<const char*>(hidden.const_data_ptr());
  gradients.x = results.like(x, needs[0]);
  gradients.down_weight = results.like(down_weight, needs[1]);
  gradients.up_weight = results.like(up_weight, needs[2]);
  gradients.down_bias = optional(down_bias, needs[3]);
  gradients.up_bias = optional(up_bias, needs[4]);
  gradients.norm_weight = optional(norm_weight, needs[5]);
  gradients.norm_bias = optional(norm_bias, needs[6]);
  gradients.scale = floats(scale, needs[7]);
  gradients.gates = floats(gates, needs[8]);
  Workspace workspace;
  cpu::level().skip_adapter.backward(problem, gradients, runtime(workspace));
  return results.tensors;
}

// ---- Instruction sets, and scratch ----

std::string cpu_isa() { return std::string(cpu::level().name); }

std::string cpu_isa_levels() { return cpu::supported_levels(); }

void select_cpu_isa(std::string name) {
  STD_TORCH_CHECK(cpu::select(name), "instruction set: this machine has ", cpu::supported_levels(), ", got ", name);
}

void poison_scratch(bool on) { poisoned = on; }

}  // namespace
}  // namespace fast_prompt

STABLE_TORCH_LIBRARY(fast_prompt_native, m) {
  m.def(
      "prompt_diffusion(Tensor hidden, Tensor source, Tensor prompts, Tensor keys, Tensor log_scale, Tensor? seed, "
      "int activation, int row_weight, float dropout_p) -> Tensor");
  m.def(
      "prompt_diffusion_backward(Tensor grad, Tensor? hidden, Tensor source, Tensor prompts, Tensor keys, "
      "Tensor log_scale, Tensor? seed, int activation, int row_weight, float dropout_p, bool needs_hidden, "
      "bool needs_source, bool needs_prompts, bool needs_keys, bool needs_log_scale) -> Tensor[]");
  m.def(
      "prompt_compress(Tensor query, Tensor visual, Tensor key_weight, Tensor value_weight, Tensor? value_bias, "
      "Tensor? key_padding_mask, Tensor? seed, int num_heads, float dropout_p, bool keep_probabilities, "
      "bool keep_attended) -> Tensor[]");
  m.def(
      "prompt_compress_backward(Tensor grad, Tensor query, Tensor visual, Tensor key_weight, Tensor value_weight, "
      "Tensor? value_bias, Tensor? key_padding_mask, Tensor? seed, int num_heads, float dropout_p, "
      "Tensor logsumexp, Tensor? probabilities, Tensor? attended, bool needs_query, bool needs_visual, "
      "bool needs_key_weight, bool needs_value_weight, bool needs_value_bias) -> Tensor[]");
  m.def(
      "skip_adapter(Tensor(a!) output, Tensor x, Tensor down_weight, Tensor up_weight, Tensor? down_bias, "
      "Tensor? up_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, Tensor? gates, Tensor? route, "
      "Tensor? seed, int norm, int activation, int residual, float eps, float dropout_p, bool keep_hidden) "
      "-> Tensor[]");
  m.def(
      "skip_adapter_backward(Tensor grad, Tensor x, Tensor down_weight, Tensor up_weight, Tensor? down_bias, "
      "Tensor? up_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? scale, Tensor? gates, Tensor? route, "
      "Tensor? seed, Tensor hidden, int norm, int activation, int residual, float eps, float dropout_p, "
      "bool[] needs) -> Tensor[]");
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_levels() -> str");
  m.def("select_cpu_isa(str name) -> ()");
  m.def("poison_scratch(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fast_prompt_native, CPU, m) {
  m.impl("prompt_diffusion", TORCH_BOX(&fast_prompt::prompt_diffusion));
  m.impl("prompt_diffusion_backward", TORCH_BOX(&fast_prompt::prompt_diffusion_backward));
  m.impl("prompt_compress", TORCH_BOX(&fast_prompt::prompt_compress));
  m.impl("prompt_compress_backward", TORCH_BOX(&fast_prompt::prompt_compress_backward));
  m.impl("skip_adapter", TORCH_BOX(&fast_prompt::skip_adapter));
  m.impl("skip_adapter_backward", TORCH_BOX(&fast_prompt::skip_adapter_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fast_prompt_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fast_prompt::cpu_isa));
  m.impl("cpu_isa_levels", TORCH_BOX(&fast_prompt::cpu_isa_levels));
  m.impl("select_cpu_isa", TORCH_BOX(&fast_prompt::select_cpu_isa));
  m.impl("poison_scratch", TORCH_BOX(&fast_prompt::poison_scratch));
}
