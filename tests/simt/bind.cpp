// The emulated kernels of one element type, for pytest. Addresses come as integers.

#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "prompt_diffusion.h"
#include "simt.h"

namespace py = pybind11;
namespace cuda = fast_prompt::cuda;
namespace kernels = cuda::FAST_PROMPT_ELEMENT;

namespace {

// Scratch memory full of NaN.
struct Scratch {
  std::vector<std::unique_ptr<unsigned char[]>> blocks;

  static void* allocate(void* self, int64_t bytes) {
    auto& blocks = static_cast<Scratch*>(self)->blocks;
    blocks.push_back(std::make_unique<unsigned char[]>(bytes + 16));
    std::memset(blocks.back().get(), 0xFF, bytes + 16);
    return blocks.back().get();
  }
};

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cuda::Rows rows(const py::tuple& tuple) {
  return {pointer<void>(tuple[0].cast<uintptr_t>()), tuple[1].cast<int64_t>(), tuple[2].cast<int64_t>(),
          tuple[3].cast<int64_t>()};
}

cuda::PromptDiffusion problem(const py::kwargs& given) {
  const auto number = [&](const char* name) { return given[name].cast<int64_t>(); };
  const auto truth = [&](const char* name) { return given[name].cast<bool>(); };
  return {number("rows"),
          number("width"),
          number("num_prompts"),
          rows(given["hidden"]),
          rows(given["source"]),
          rows(given["prompts"]),
          rows(given["keys"]),
          truth("float_weights"),
          pointer<const float>(number("log_scale")),
          pointer<const int64_t>(number("seed")),
          truth("softmax"),
          truth("max_weight"),
          static_cast<uint32_t>(number("dropout_threshold")),
          given["kept_scale"].cast<float>()};
}

void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

void forward(uintptr_t output, const py::kwargs& given) {
  Scratch scratch;
  check(kernels::prompt_diffusion.forward(problem(given), pointer<void>(output),
                                          {nullptr, &scratch, Scratch::allocate}));
}

void backward(const py::tuple& grad, uintptr_t hidden, uintptr_t source, uintptr_t prompts, uintptr_t keys,
              uintptr_t log_scale, const py::kwargs& given) {
  Scratch scratch;
  check(kernels::prompt_diffusion.backward(problem(given),
                                           {rows(grad), pointer<void>(hidden), pointer<void>(source),
                                            pointer<void>(prompts), pointer<void>(keys), pointer<float>(log_scale)},
                                           {nullptr, &scratch, Scratch::allocate}));
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, module) {
  py::class_<simt::Settings>(module, "Settings", py::module_local())
      .def_readwrite("reverse", &simt::Settings::reverse)
      .def_readwrite("late_copies", &simt::Settings::late_copies)
      .def_readwrite("multiprocessors", &simt::Settings::multiprocessors)
      .def_readwrite("shared_bytes", &simt::Settings::shared_bytes)
      .def_readwrite("most_shared_bytes", &simt::Settings::most_shared_bytes);
  module.def("settings", &simt::settings, py::return_value_policy::reference);
  module.def("prompt_diffusion", forward);
  module.def("prompt_diffusion_backward", backward);
}
