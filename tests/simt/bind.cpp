// The emulator's binding to PyTorch: the CUDA kernels' own, on CPU tensors, with results between guards and scratch full
// of NaN. Which compiled kernels run is set from Python, so that one binding serves them all, planted bugs included.

#include <cstring>
#include <memory>

#include "bind/library.h"
#include "cuda/runtime.h"
#include "simt.h"

namespace fast_prompt {
namespace {

enum Op { PROMPT_DIFFUSION, PROMPT_COMPRESS, SKIP_ADAPTER, OPS };

const void* kernels[OPS][3];  // by the activations' type, a Dtype

struct Simt {
  class Call {
    static constexpr int64_t MARGIN = 512;  // elements: more than a row, and a multiple of the 64 bytes torch begins at

    std::vector<std::unique_ptr<unsigned char[]>> scratch;
    std::vector<Tensor> guarded;  // whole, with a margin before and after the result

    static void* allocate(void* self, int64_t bytes) {
      auto& blocks = static_cast<Call*>(self)->scratch;
      blocks.push_back(std::make_unique<unsigned char[]>(bytes + 16));
      std::memset(blocks.back().get(), 0xFF, bytes + 16);
      return blocks.back().get();
    }

    static bool is_poison(const Tensor& whole, int64_t first, int64_t last) {
      const auto* const bytes = static_cast<const unsigned char*>(whole.const_data_ptr());
      const int64_t size = whole.scalar_type() == ScalarType::Float ? 4 : 2;
      for (int64_t at = first * size; at < last * size; ++at)
        if (bytes[at] != 0xFF) return false;
      return true;
    }

   public:
    explicit Call(const Tensor&) {}

    Tensor empty(const Sizes& sizes, ScalarType type) {
      int64_t count = 1;
      for (const int64_t size : sizes) count *= size;
      Tensor whole = torch::stable::empty({count + 2 * MARGIN}, type);
      std::memset(whole.data_ptr(), 0xFF, whole.numel() * (type == ScalarType::Float ? 4 : 2));  // NaN
      guarded.push_back(whole);
      return torch::stable::view(torch::stable::narrow(whole, 0, MARGIN, count), sizes);
    }

    template <class Launcher, class Problem, class Results>
    void run(Launcher* launcher, const Problem& problem, const Results& results) {
      const char* const error = launcher(problem, results, cuda::Runtime{0, simt::callers_stream(), this, allocate});
      STD_TORCH_CHECK(error == nullptr, error);
      for (const Tensor& whole : guarded)
        STD_TORCH_CHECK(is_poison(whole, 0, MARGIN) && is_poison(whole, whole.numel() - MARGIN, whole.numel()),
                        "written outside of the result");
    }
  };

  template <template <class> class Kernels, Op op>
  static const auto& find(const Tensor& activations) {
    const void* const found = kernels[op][static_cast<int>(dtype_of(activations))];
    STD_TORCH_CHECK(found, "there are no emulated kernels for this type");
    return *static_cast<const Kernels<cuda::Runtime>*>(found);
  }

  static const auto& prompt_diffusion(const Tensor& x) { return find<PromptDiffusionKernels, PROMPT_DIFFUSION>(x); }
  static const auto& prompt_compress(const Tensor& x) { return find<PromptCompressKernels, PROMPT_COMPRESS>(x); }
  static const auto& skip_adapter(const Tensor& x) { return find<SkipAdapterKernels, SKIP_ADAPTER>(x); }

  static ScalarType hidden_type(ScalarType x) { return x; }
};

}  // namespace
}  // namespace fast_prompt

extern "C" void simt_use(int op, int type, const void* table) { fast_prompt::kernels[op][type] = table; }

STABLE_TORCH_LIBRARY_IMPL(fast_prompt, CPU, m) { FAST_PROMPT_REGISTER(m, fast_prompt::Simt, "_simt"); }
