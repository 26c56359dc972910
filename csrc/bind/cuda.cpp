// The CUDA kernels' binding to PyTorch, built where nvcc is. It needs no CUDA of torch's: under a CPU torch the library
// loads as well, and nothing here is ever called.

#include "cuda.h"

#include <torch/csrc/stable/accelerator.h>

// A CPU torch does not have it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace fast_prompt {
namespace {

struct Cuda : CudaKernels {
  // Makes the activations' device the current one; launches on its current stream, with scratch memory of torch's.
  class Call {
    torch::stable::accelerator::DeviceGuard guard;
    torch::stable::Device device;
    std::vector<Tensor> scratch;

    static void* allocate(void* self, int64_t bytes) {
      auto& call = *static_cast<Call*>(self);
      call.scratch.push_back(torch::stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, call.device));
      return call.scratch.back().data_ptr();
    }

   public:
    explicit Call(const Tensor& activations)
        : guard(activations.get_device_index()), device(activations.device()) {}

    Tensor empty(const Sizes& sizes, ScalarType type) {
      return torch::stable::empty(sizes, type, std::nullopt, device);
    }

    template <class Launcher, class Problem, class Results>
    void run(Launcher* launcher, const Problem& problem, const Results& results) {
      STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
      void* stream = nullptr;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream));
      const char* const error = launcher(problem, results, cuda::Runtime{device.index(), stream, this, allocate});
      STD_TORCH_CHECK(error == nullptr, "CUDA: ", error);
    }
  };
};

}  // namespace
}  // namespace fast_prompt

STABLE_TORCH_LIBRARY_IMPL(fast_prompt, CUDA, m) { FAST_PROMPT_REGISTER(m, fast_prompt::Cuda, ""); }
