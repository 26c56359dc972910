// The compiled library's face to PyTorch: checks tensors, hands the kernels plain pointers, returns tensors.
// PyTorch's stable ABI only, so one library serves every torch from 2.11 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "bind.h"
#include "cpu/isa.h"
#include "cpu/prompt_diffusion.h"

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
  return {data, dtype_of(tensor), sizes[rank - 2], rank == 3 ? strides[0] : 0, strides[rank - 2]};
}

Tensor contiguous_like(const Tensor& tensor) {
  return torch::stable::empty(tensor.sizes(), tensor.scalar_type());
}

// ---- Memory and threads for one call ----

struct Workspace {
  std::vector<Tensor> blocks;

  static void* allocate(void* self, int64_t bytes) {
    const int64_t sizes[] = {bytes};
    auto& blocks = static_cast<Workspace*>(self)->blocks;
    blocks.push_back(torch::stable::empty({sizes, 1}, ScalarType::Byte));
    return blocks.back().data_ptr();
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
                                              const std::optional<Tensor>& seed, const std::string& activation,
                                              const std::string& row_weight, double dropout_p) {
  check_prompt_diffusion(hidden, source, prompts, keys, log_scale, seed, activation, row_weight, dropout_p);
  cpu::PromptDiffusion problem{};
  problem.rows = source.sizes()[0] * source.sizes()[1];
  problem.width = source.sizes()[2];
  problem.num_prompts = prompts.sizes()[0];
  problem.source = rows_of(source);
  if (hidden) problem.hidden = rows_of(*hidden);
  problem.prompts = rows_of(prompts);
  problem.keys = rows_of(keys);
  problem.scale = std::exp(*log_scale.const_data_ptr<float>());
  problem.softmax = activation == "softmax";
  problem.max_weight = row_weight == "max";
  if (dropout_p > 0) {
    problem.dropout = true;
    problem.dropout_threshold = dropout_threshold(dropout_p);
    problem.kept_scale = kept_scale(dropout_p);
    problem.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  }
  return problem;
}

Tensor prompt_diffusion(Tensor hidden, Tensor source, Tensor prompts, Tensor keys, Tensor log_scale,
                        std::optional<Tensor> seed, std::string activation, std::string row_weight,
                        double dropout_p) {
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
                                              std::optional<Tensor> seed, std::string activation,
                                              std::string row_weight, double dropout_p, bool needs_hidden,
                                              bool needs_source, bool needs_prompts, bool needs_keys,
                                              bool needs_log_scale) {
  const auto problem = prompt_diffusion_problem(hidden, source, prompts, keys, log_scale, seed, activation,
                                                row_weight, dropout_p);
  STD_TORCH_CHECK(hidden || !needs_log_scale, "hidden: needed for the gradient of log_scale");
  check_activations(grad, "grad", source);

  std::vector<Tensor> results;
  const auto result_like = [&results](const Tensor& tensor, bool needed) {
    if (!needed) return cpu::Rows{};
    results.push_back(contiguous_like(tensor));
    return rows_of(results.back());
  };
  cpu::PromptDiffusionGradients gradients{};
  gradients.grad = rows_of(grad);
  gradients.hidden = result_like(source, needs_hidden);
  gradients.source = result_like(source, needs_source);
  gradients.prompts = result_like(prompts, needs_prompts);
  gradients.keys = result_like(keys, needs_keys);
  if (needs_log_scale) {
    results.push_back(contiguous_like(log_scale));
    gradients.log_scale = results.back().mutable_data_ptr<float>();
  }
  Workspace workspace;
  cpu::level().prompt_diffusion.backward(problem, gradients, runtime(workspace));
  return results;
}

// ---- Instruction sets ----

std::string cpu_isa() { return std::string(cpu::level().name); }

std::string cpu_isa_levels() { return cpu::supported_levels(); }

void select_cpu_isa(std::string name) {
  STD_TORCH_CHECK(cpu::select(name), "instruction set: this machine has ", cpu::supported_levels(), ", got ", name);
}

}  // namespace
}  // namespace fast_prompt

STABLE_TORCH_LIBRARY(fast_prompt_native, m) {
  m.def(
      "prompt_diffusion(Tensor hidden, Tensor source, Tensor prompts, Tensor keys, Tensor log_scale, Tensor? seed, "
      "str activation, str row_weight, float dropout_p) -> Tensor");
  m.def(
      "prompt_diffusion_backward(Tensor grad, Tensor? hidden, Tensor source, Tensor prompts, Tensor keys, "
      "Tensor log_scale, Tensor? seed, str activation, str row_weight, float dropout_p, bool needs_hidden, "
      "bool needs_source, bool needs_prompts, bool needs_keys, bool needs_log_scale) -> Tensor[]");
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_levels() -> str");
  m.def("select_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fast_prompt_native, CPU, m) {
  m.impl("prompt_diffusion", TORCH_BOX(&fast_prompt::prompt_diffusion));
  m.impl("prompt_diffusion_backward", TORCH_BOX(&fast_prompt::prompt_diffusion_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fast_prompt_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fast_prompt::cpu_isa));
  m.impl("cpu_isa_levels", TORCH_BOX(&fast_prompt::cpu_isa_levels));
  m.impl("select_cpu_isa", TORCH_BOX(&fast_prompt::select_cpu_isa));
}
