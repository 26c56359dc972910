// The emulated kernels of prompt_compress for one element type, for pytest.

#include "bind.h"
#include "prompt_compress.h"

namespace kernels = cuda::FAST_PROMPT_ELEMENT;

namespace {

cuda::PromptCompress problem(const py::kwargs& values) {
  const Given given{values};
  const auto padding = values["padding"].cast<py::tuple>();
  return {given.number("batch"),
          given.number("queries"),
          given.number("tokens"),
          given.number("heads"),
          given.number("head_width"),
          given.number("visual_width"),
          rows(values["query"]),
          rows(values["visual"]),
          rows(values["key_weight"]),
          rows(values["value_weight"]),
          given.address<const void>("value_bias"),
          given.truth("float_weights"),
          {pointer<const bool>(padding[0].cast<uintptr_t>()), padding[1].cast<int64_t>(), padding[2].cast<int64_t>()},
          given.address<const int64_t>("seed"),
          static_cast<uint32_t>(given.number("dropout_threshold")),
          values["kept_scale"].cast<float>()};
}

void forward(uintptr_t output, uintptr_t logsumexp, uintptr_t probabilities, uintptr_t attended,
             const py::kwargs& given) {
  Scratch scratch;
  check(kernels::prompt_compress.forward(
      problem(given),
      {pointer<void>(output), pointer<float>(logsumexp), pointer<float>(probabilities), pointer<float>(attended)},
      scratch.runtime()));
}

void backward(const py::tuple& grad, uintptr_t probabilities, uintptr_t attended, uintptr_t query, uintptr_t visual,
              uintptr_t key_weight, uintptr_t value_weight, uintptr_t value_bias, const py::kwargs& given) {
  Scratch scratch;
  check(kernels::prompt_compress.backward(
      problem(given),
      {rows(grad), pointer<const float>(probabilities), pointer<const float>(attended), pointer<void>(query),
       pointer<void>(visual), pointer<void>(key_weight), pointer<void>(value_weight), pointer<void>(value_bias)},
      scratch.runtime()));
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, module) {
  bind_settings(module);
  module.def("prompt_compress", forward);
  module.def("prompt_compress_backward", backward);
}
