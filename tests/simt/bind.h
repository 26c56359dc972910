// What the bindings of every op's emulated kernels share. Addresses come as integers.

#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "runtime.h"
#include "simt.h"

namespace py = pybind11;
namespace cuda = fast_prompt::cuda;

// Scratch memory full of NaN.
class Scratch {
  std::vector<std::unique_ptr<unsigned char[]>> blocks;

  static void* allocate(void* self, int64_t bytes) {
    auto& blocks = static_cast<Scratch*>(self)->blocks;
    blocks.push_back(std::make_unique<unsigned char[]>(bytes + 16));
    std::memset(blocks.back().get(), 0xFF, bytes + 16);
    return blocks.back().get();
  }

 public:
  cuda::Runtime runtime() { return {nullptr, this, allocate}; }
};

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline cuda::Rows rows(const py::handle& given) {
  const auto tuple = py::cast<py::tuple>(given);
  return {pointer<void>(tuple[0].cast<uintptr_t>()), tuple[1].cast<int64_t>(), tuple[2].cast<int64_t>(),
          tuple[3].cast<int64_t>()};
}

// The members of a description by their names.
struct Given {
  const py::kwargs& values;

  int64_t number(const char* name) const { return values[name].cast<int64_t>(); }
  bool truth(const char* name) const { return values[name].cast<bool>(); }
  template <class T>
  T* address(const char* name) const {
    return pointer<T>(values[name].cast<uintptr_t>());
  }
};

inline void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

inline void bind_settings(py::module_& module) {
  py::class_<simt::Settings>(module, "Settings", py::module_local())
      .def_readwrite("reverse", &simt::Settings::reverse)
      .def_readwrite("late_copies", &simt::Settings::late_copies)
      .def_readwrite("multiprocessors", &simt::Settings::multiprocessors)
      .def_readwrite("shared_bytes", &simt::Settings::shared_bytes)
      .def_readwrite("most_shared_bytes", &simt::Settings::most_shared_bytes);
  module.def("settings", &simt::settings, py::return_value_policy::reference);
}
