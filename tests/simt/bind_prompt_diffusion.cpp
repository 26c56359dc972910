// The emulated kernels of prompt_diffusion for one element type, for pytest.

#include "bind.h"
#include "prompt_diffusion.h"

namespace kernels = cuda::FAST_PROMPT_ELEMENT;

namespace {

cuda::PromptDiffusion problem(const py::kwargs& values) {
  const Given given{values};
  return {given.number("rows"),
          given.number("width"),
          given.number("num_prompts"),
          rows(values["hidden"]),
          rows(values["source"]),
          rows(values["prompts"]),
          rows(values["keys"]),
          given.truth("float_weights"),
          given.address<const float>("log_scale"),
          given.address<const int64_t>("seed"),
          given.truth("softmax"),
          given.truth("max_weight"),
          static_cast<uint32_t>(given.number("dropout_threshold")),
          values["kept_scale"].cast<float>()};
}

void forward(uintptr_t output, const py::kwargs& given) {
  Scratch scratch;
  check(kernels::prompt_diffusion.forward(problem(given), pointer<void>(output), scratch.runtime()));
}

void backward(const py::tuple& grad, uintptr_t hidden, uintptr_t source, uintptr_t prompts, uintptr_t keys,
              uintptr_t log_scale, const py::kwargs& given) {
  Scratch scratch;
  check(kernels::prompt_diffusion.backward(problem(given),
                                           {rows(grad), pointer<void>(hidden), pointer<void>(source),
                                            pointer<void>(prompts), pointer<void>(keys), pointer<float>(log_scale)},
                                           scratch.runtime()));
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, module) {
  bind_settings(module);
  module.def("prompt_diffusion", forward);
  module.def("prompt_diffusion_backward", backward);
}
