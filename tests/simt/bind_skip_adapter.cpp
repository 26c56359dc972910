// The emulated kernels of skip_adapter for one element type, for pytest.

#include <pybind11/stl.h>

#include "bind.h"
#include "skip_adapter.h"

namespace kernels = cuda::FAST_PROMPT_ELEMENT;

namespace {

cuda::SkipAdapter problem(const py::kwargs& values) {
  const Given given{values};
  cuda::SkipAdapter problem{};
  problem.batch = given.number("batch");
  problem.rows = given.number("rows");
  problem.width = given.number("width");
  problem.hidden_width = given.number("hidden_width");
  problem.adapters = given.number("adapters");
  problem.experts = given.number("experts");
  problem.groups = given.number("groups");
  problem.x = rows(values["x"]);
  problem.down_weight = rows(values["down_weight"]);
  problem.up_weight = rows(values["up_weight"]);
  problem.down_bias = rows(values["down_bias"]);
  problem.up_bias = rows(values["up_bias"]);
  problem.norm_weight = rows(values["norm_weight"]);
  problem.norm_bias = rows(values["norm_bias"]);
  problem.float_weights = given.truth("float_weights");
  problem.scale = given.address<const float>("scale");
  problem.gates = given.address<const float>("gates");
  problem.route = given.address<const int64_t>("route");
  problem.seed = given.address<const int64_t>("seed");
  problem.norm = static_cast<cuda::SkipNorm>(given.number("norm"));
  problem.activation = static_cast<cuda::SkipActivation>(given.number("activation"));
  problem.residual = static_cast<cuda::SkipResidual>(given.number("residual"));
  problem.eps = values["eps"].cast<float>();
  problem.dropout_threshold = static_cast<uint32_t>(given.number("dropout_threshold"));
  problem.kept_scale = values["kept_scale"].cast<float>();
  return problem;
}

void forward(uintptr_t output, uintptr_t hidden, const py::kwargs& given) {
  Scratch scratch;
  check(kernels::skip_adapter.forward(problem(given), {pointer<void>(output), pointer<void>(hidden)},
                                      scratch.runtime()));
}

// The results' addresses are in the order of the struct; 0 where not wanted.
void backward(const py::tuple& grad, uintptr_t hidden, const std::vector<uintptr_t>& results,
              const py::kwargs& given) {
  Scratch scratch;
  const auto result = [&](int i) { return pointer<void>(results.at(i)); };
  check(kernels::skip_adapter.backward(
      problem(given),
      {rows(grad), pointer<const void>(hidden), result(0), result(1), result(2), result(3), result(4), result(5),
       result(6), pointer<float>(results.at(7)), pointer<float>(results.at(8))},
      scratch.runtime()));
}

}  // namespace

PYBIND11_MODULE(SIMT_MODULE, module) {
  bind_settings(module);
  module.def("skip_adapter", forward);
  module.def("skip_adapter_backward", backward);
}
