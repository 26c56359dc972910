// The CUDA kernels' binding to PyTorch, built where nvcc is. It needs no CUDA of torch's: under a CPU torch the library
// loads as well, and nothing here is ever called.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "bind.h"
#include "cuda/prompt_compress.h"
#include "cuda/prompt_diffusion.h"
#include "cuda/skip_adapter.h"

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

template <class Kernels>
const Kernels& of_type(const Tensor& activations, const Kernels& float32, const Kernels& bfloat16,
                       const Kernels& float16) {
  switch (activations.scalar_type()) {
    case ScalarType::BFloat16: return bfloat16;
    case ScalarType::Half: return float16;
    default: return float32;
  }
}

template <class Problem>
void set_dropout(Problem& problem, const std::optional<Tensor>& seed, double dropout_p) {
  problem.kept_scale = 1;
  if (dropout_p == 0) return;
  problem.seed = seed->const_data_ptr<int64_t>();
  problem.dropout_threshold = dropout_threshold(dropout_p);
  problem.kept_scale = kept_scale(dropout_p);
}

Tensor contiguous_like(const Tensor& tensor) {
  return torch::stable::empty(tensor.sizes(), tensor.scalar_type(), std::nullopt, tensor.device());
}

// The gradients that are needed, in the order they were asked for.
struct Results {
  std::vector<Tensor> tensors;

  void* like(const Tensor& tensor, bool needed) {
    if (!needed) return nullptr;
    tensors.push_back(contiguous_like(tensor));
    return tensors.back().data_ptr();
  }
};

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "CUDA: ", error); }

// ---- prompt_diffusion ----

const cuda::PromptDiffusionKernels& prompt_diffusion_kernels(const Tensor& activations) {
  return of_type(activations, cuda::float32::prompt_diffusion, cuda::bfloat16::prompt_diffusion,
                 cuda::float16::prompt_diffusion);
}

cuda::PromptDiffusion prompt_diffusion_problem(const std::optional<Tensor>& hidden, const Tensor& source,
                                               const Tensor& prompts, const Tensor& keys, const Tensor& log_scale,
                                               const std::optional<Tensor>& seed, int64_t activation,
                                               int64_t row_weight, double dropout_p) {
  check_prompt_diffusion(hidden, source, prompts, keys, log_scale, seed, dropout_p);
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
  problem.softmax = option<DiffusionActivation>("activation", activation) == DiffusionActivation::SOFTMAX;
  problem.max_weight = option<RowWeight>("row_weight", row_weight) == RowWeight::MAX;
  set_dropout(problem, seed, dropout_p);
  return problem;
}

Tensor prompt_diffusion(Tensor hidden, Tensor source, Tensor prompts, Tensor keys, Tensor log_scale,
                        std::optional<Tensor> seed, int64_t activation, int64_t row_weight, double dropout_p) {
  const auto problem = prompt_diffusion_problem(hidden, source, prompts, keys, log_scale, seed, activation,
                                                row_weight, dropout_p);
  Launch launch(source);
  Tensor output = contiguous_like(source);
  check(prompt_diffusion_kernels(source).forward(problem, output.data_ptr(), launch.runtime()));
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

  Launch launch(source);
  Results results;
  cuda::PromptDiffusionGradients gradients{};
  gradients.grad = rows_of(grad);
  gradients.hidden = results.like(source, needs_hidden);
  gradients.source = results.like(source, needs_source);
  gradients.prompts = results.like(prompts, needs_prompts);
  gradients.keys = results.like(keys, needs_keys);
  gradients.log_scale = static_cast<float*>(results.like(log_scale, needs_log_scale));
  if (!results.tensors.empty())
    check(prompt_diffusion_kernels(source).backward(problem, gradients, launch.runtime()));
  return results.tensors;
}

// ---- prompt_compress ----

const cuda::PromptCompressKernels& prompt_compress_kernels(const Tensor& activations) {
  return of_type(activations, cuda::float32::prompt_compress, cuda::bfloat16::prompt_compress,
                 cuda::float16::prompt_compress);
}

cuda::PromptCompress prompt_compress_problem(const Tensor& query, const Tensor& visual, const Tensor& key_weight,
                                             const Tensor& value_weight, const std::optional<Tensor>& value_bias,
                                             const std::optional<Tensor>& key_padding_mask,
                                             const std::optional<Tensor>& seed, int64_t num_heads, double dropout_p) {
  check_prompt_compress(query, visual, key_weight, value_weight, value_bias, key_padding_mask, seed, num_heads,
                        dropout_p);
  cuda::PromptCompress problem{};
  problem.batch = query.sizes()[0];
  problem.queries = query.sizes()[1];
  problem.tokens = visual.sizes()[1];
  problem.heads = num_heads;
  problem.head_width = query.sizes()[2] / num_heads;
  problem.visual_width = visual.sizes()[2];
  problem.query = rows_of(query);
  problem.visual = rows_of(visual);
  problem.key_weight = rows_of(key_weight);
  problem.value_weight = rows_of(value_weight);
  if (value_bias) problem.value_bias = value_bias->const_data_ptr();
  problem.float_weights = key_weight.scalar_type() == ScalarType::Float;
  if (key_padding_mask)
    problem.padding = {key_padding_mask->const_data_ptr<bool>(), key_padding_mask->strides()[0],
                       key_padding_mask->strides()[1]};
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
  Launch launch(query);
  std::vector<Tensor> results{contiguous_like(query)};
  const auto by_row = [&](bool wanted, std::vector<int64_t> last) -> float* {
    if (!wanted) return nullptr;
    std::vector<int64_t> sizes{problem.batch, problem.heads, problem.queries};
    sizes.insert(sizes.end(), last.begin(), last.end());
    results.push_back(torch::stable::empty(sizes, ScalarType::Float, std::nullopt, query.device()));
    return results.back().mutable_data_ptr<float>();
  };
  const cuda::PromptCompressResults wanted{results[0].data_ptr(), by_row(true, {}),
                                           by_row(keep_probabilities, {problem.tokens}),
                                           by_row(keep_attended, {problem.visual_width})};
  check(prompt_compress_kernels(query).forward(problem, wanted, launch.runtime()));
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
  if (attended) check_kept(*attended, "attended", query, num_heads, problem.visual_width);

  Launch launch(query);
  Results results;
  cuda::PromptCompressGradients gradients{};
  gradients.grad = rows_of(grad);
  if (probabilities) gradients.probabilities = probabilities->const_data_ptr<float>();
  if (attended) gradients.attended = attended->const_data_ptr<float>();
  gradients.query = results.like(query, needs_query);
  gradients.visual = results.like(visual, needs_visual);
  gradients.key_weight = results.like(key_weight, needs_key_weight);
  gradients.value_weight = results.like(value_weight, needs_value_weight);
  if (needs_value_bias) gradients.value_bias = results.like(*value_bias, true);
  if (!results.tensors.empty())
    check(prompt_compress_kernels(query).backward(problem, gradients, launch.runtime()));
  return results.tensors;
}

// ---- skip_adapter ----

const cuda::SkipAdapterKernels& skip_adapter_kernels(const Tensor& activations) {
  return of_type(activations, cuda::float32::skip_adapter, cuda::bfloat16::skip_adapter, cuda::float16::skip_adapter);
}

cuda::SkipAdapter skip_adapter_problem(const SkipAdapterInputs& in, double eps) {
  check_skip_adapter(in);
  const auto rows = [](const std::optional<Tensor>& tensor) { return tensor ? rows_of(*tensor) : cuda::Rows{}; };
  cuda::SkipAdapter problem{};
  problem.batch = in.batch();
  problem.rows = in.tokens();
  problem.width = in.width();
  problem.hidden_width = in.adapter_width();
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
  problem.float_weights = in.down_weight.scalar_type() == ScalarType::Float;
  if (in.scale) problem.scale = in.scale->const_data_ptr<float>();
  if (in.gates) problem.gates = in.gates->const_data_ptr<float>();
  if (in.route) problem.route = in.route->const_data_ptr<int64_t>();
  problem.norm = static_cast<cuda::SkipNorm>(in.options.norm);
  problem.activation = static_cast<cuda::SkipActivation>(in.options.activation);
  problem.residual = static_cast<cuda::SkipResidual>(in.options.residual);
  problem.eps = static_cast<float>(eps);
  set_dropout(problem, in.seed, in.dropout_p);
  return problem;
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
  Launch launch(x);
  std::vector<Tensor> kept;
  if (keep_hidden)
    kept.push_back(torch::stable::empty(in.hidden_sizes(), x.scalar_type(), std::nullopt, x.device()));
  check(skip_adapter_kernels(x).forward(problem, {output.data_ptr(), keep_hidden ? kept[0].data_ptr() : nullptr},
                                        launch.runtime()));
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
  check_skip_adapter_backward(in, grad, hidden, x.scalar_type(), needs);

  Launch launch(x);
  Results results;
  const auto wanted = [&](const std::optional<Tensor>& tensor, bool needed) {
    return needed ? results.like(*tensor, true) : nullptr;
  };
  cuda::SkipAdapterGradients gradients{};
  gradients.grad = rows_of(grad);
  gradients.hidden = hidden.const_data_ptr();
  gradients.x = results.like(x, needs[0]);
  gradients.down_weight = results.like(down_weight, needs[1]);
  gradients.up_weight = results.like(up_weight, needs[2]);
  gradients.down_bias = wanted(down_bias, needs[3]);
  gradients.up_bias = wanted(up_bias, needs[4]);
  gradients.norm_weight = wanted(norm_weight, needs[5]);
  gradients.norm_bias = wanted(norm_bias, needs[6]);
  gradients.scale = static_cast<float*>(wanted(scale, needs[7]));
  gradients.gates = static_cast<float*>(wanted(gates, needs[8]));
  if (!results.tensors.empty()) check(skip_adapter_kernels(x).backward(problem, gradients, launch.runtime()));
  return results.tensors;
}

}  // namespace
}  // namespace fast_prompt

STABLE_TORCH_LIBRARY_IMPL(fast_prompt_native, CUDA, m) {
  m.impl("prompt_diffusion", TORCH_BOX(&fast_prompt::prompt_diffusion));
  m.impl("prompt_diffusion_backward", TORCH_BOX(&fast_prompt::prompt_diffusion_backward));
  m.impl("prompt_compress", TORCH_BOX(&fast_prompt::prompt_compress));
  m.impl("prompt_compress_backward", TORCH_BOX(&fast_prompt::prompt_compress_backward));
  m.impl("skip_adapter", TORCH_BOX(&fast_prompt::skip_adapter));
  m.impl("skip_adapter_backward", TORCH_BOX(&fast_prompt::skip_adapter_backward));
}
