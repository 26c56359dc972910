// The CUDA kernels' face to PyTorch, built where nvcc is. It needs no CUDA of torch's: under a CPU torch the library
// loads as well, and nothing here is ever called.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "bind.h"
#include "cuda/prompt_diffusion.h"

// A CPU torch does not have it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace fast_prompt {
namespace {

// Makes the tensor's device the current one, and gives kernels its current stream and scratch memory of torch's.
class Launch {
  torch::stable::accelerator::DeviceGuard guard;
  torch::stable::Device device;
  std::vector<Tensor> scratch;

  static void* allocate(void* self, int64_t bytes) {
    auto& launch = *static_cast<Launch*>(self);
    launch.scratch.push_back(torch::stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, launch.device));
    return launch.scratch.back().data_ptr();
  }

 public:
  explicit Launch(const Tensor& tensor) : guard(tensor.get_device_index()), device(tensor.device()) {}

  cuda::Runtime runtime() {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream));
    return {stream, this, allocate};
  }
};

cuda::Rows rows_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const size_t rank = sizes.size();
  cuda::Rows rows{const_cast<void*>(tensor.const_data_ptr()), sizes[rank - 2], rank == 3 ? strides[0] : 0,
                  strides[rank - 2]};
  // Batches that follow on one another are one: spares the kernels a division for each row.
  if (rank == 3 && rows.batch_stride == rows.rows_per_batch * rows.row_stride) rows.rows_per_batch *= sizes[0];
  return rows;
}

const cuda::PromptDiffusionKernels& kernels(const Tensor& activations) {
  switch (activations.scalar_type()) {
    case ScalarType::BFloat16: return cuda::bfloat16::prompt_diffusion;
    case ScalarType::Half: return cuda::float16::prompt_diffusion;
    default: return cuda::float32::prompt_diffusion;
  }
}

cuda::PromptDiffusion describe(const std::optional<Tensor>& hidden, const Tensor& source, const Tensor& prompts,
                               const Tensor& keys, const Tensor& log_scale, const std::optional<Tensor>& seed,
                               const std::string& activation, const std::string& row_weight, double dropout_p) {
  check_prompt_diffusion(hidden, source, prompts, keys, log_scale, seed, activation, row_weight, dropout_p);
  STD_TORCH_CHECK(prompts.scalar_type() == source.scalar_type() || prompts.scalar_type() == ScalarType::Float,
                  "prompts: expected the dtype of source, or float32");
  cuda::PromptDiffusion problem{};
  problem.rows = source.sizes()[0] * source.sizes()[1];
  problem.width = source.sizes()[2];
  problem.num_prompts = prompts.sizes()[0];
  if (hidden) problem.hidden = rows_of(*hidden);
  problem.source = rows_of(source);
  problem.prompts = rows_of(prompts);
  problem.keys = rows_of(keys);
  problem.float_weights = prompts.scalar_type() == ScalarType::Float;
  problem.log_scale = log_scale.const_data_ptr<float>();
  problem.softmax = activation == "softmax";
  problem.max_weight = row_weight == "max";
  problem.kept_scale = 1;
  if (dropout_p > 0) {
    problem.seed = seed->const_data_ptr<int64_t>();
    problem.dropout_threshold = dropout_threshold(dropout_p);
    problem.kept_scale = kept_scale(dropout_p);
  }
  return problem;
}

Tensor contiguous_like(const Tensor& tensor) {
  return torch::stable::empty(tensor.sizes(), tensor.scalar_type(), std::nullopt, tensor.device());
}

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "CUDA: ", error); }

Tensor prompt_diffusion(Tensor hidden, Tensor source, Tensor prompts, Tensor keys, Tensor log_scale,
                        std::optional<Tensor> seed, std::string activation, std::string row_weight,
                        double dropout_p) {
  const auto problem = describe(hidden, source, prompts, keys, log_scale, seed, activation, row_weight, dropout_p);
  Launch launch(source);
  Tensor output = contiguous_like(source);
  check(kernels(source).forward(problem, output.data_ptr(), launch.runtime()));
  return output;
}

// The gradients that are needed, in the order of the flags.
std::vector<Tensor> prompt_diffusion_backward(Tensor grad, std::optional<Tensor> hidden, Tensor source,
                                              Tensor prompts, Tensor keys, Tensor log_scale,
                                              std::optional<Tensor> seed, std::string activation,
                                              std::string row_weight, double dropout_p, bool needs_hidden,
                                              bool needs_source, bool needs_prompts, bool needs_keys,
                                              bool needs_log_scale) {
  const auto problem = describe(hidden, source, prompts, keys, log_scale, seed, activation, row_weight, dropout_p);
  STD_TORCH_CHECK(hidden || !needs_log_scale, "hidden: needed for the gradient of log_scale");
  check_activations(grad, "grad", source);

  Launch launch(source);
  std::vector<Tensor> results;
  const auto result_like = [&results](const Tensor& tensor, bool needed) -> void* {
    if (!needed) return nullptr;
    results.push_back(contiguous_like(tensor));
    return results.back().data_ptr();
  };
  cuda::PromptDiffusionGradients gradients{};
  gradients.grad = rows_of(grad);
  gradients.hidden = result_like(source, needs_hidden);
  gradients.source = result_like(source, needs_source);
  gradients.prompts = result_like(prompts, needs_prompts);
  gradients.keys = result_like(keys, needs_keys);
  gradients.log_scale = static_cast<float*>(result_like(log_scale, needs_log_scale));
  if (!results.empty()) check(kernels(source).backward(problem, gradients, launch.runtime()));
  return results;
}

}  // namespace
}  // namespace fast_prompt

STABLE_TORCH_LIBRARY_IMPL(fast_prompt_native, CUDA, m) {
  m.impl("prompt_diffusion", TORCH_BOX(&fast_prompt::prompt_diffusion));
  m.impl("prompt_diffusion_backward", TORCH_BOX(&fast_prompt::prompt_diffusion_backward));
}
