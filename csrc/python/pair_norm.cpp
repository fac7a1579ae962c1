// SPDX-License-Identifier: MIT
// Pair norms for Python; lmtfast/backends/native.py has checked dtype, device, shape and strides.
#include "python/status.h"

namespace py = pybind11;

namespace lmtfast::python {
namespace {

using Address = std::uintptr_t;

lmtfast_pair_norm problem_of(int64_t dtype, int64_t k, int64_t d, int64_t u, int64_t stride,
                             Address weight, Address classes) {
  return {dtype, k, d, u, stride, address(weight), static_cast<const int64_t*>(address(classes))};
}

void forward(const lmtfast_pair_norm& problem, Address norms, int64_t num_threads) {
  lmtfast_status status;
  {
    const py::gil_scoped_release release;
    status = lmtfast_pair_norm_forward(&problem, static_cast<float*>(address(norms)), num_threads);
  }
  raise_unless_ok(status);
}

void vjp(const lmtfast_pair_norm& problem, Address norms, Address grad, Address grad_weight,
         int64_t num_threads) {
  lmtfast_status status;
  {
    const py::gil_scoped_release release;
    status = lmtfast_pair_norm_vjp(&problem, static_cast<const float*>(address(norms)),
                                   static_cast<const float*>(address(grad)), address(grad_weight),
                                   num_threads);
  }
  raise_unless_ok(status);
}

}  // namespace

void bind_pair_norm(py::module_& m) {
  py::class_<lmtfast_pair_norm>(
      m, "PairNorm", "Sizes, the stride and addresses; holds no reference to the buffers.")
      .def(py::init(&problem_of), py::arg("dtype"), py::arg("k"), py::arg("d"), py::arg("u"),
           py::arg("weight_stride"), py::arg("weight"), py::arg("classes"))
      .def("forward", &forward, py::arg("norms"), py::arg("num_threads"))
      .def("vjp", &vjp, py::arg("norms"), py::arg("grad"), py::arg("grad_weight"),
           py::arg("num_threads"));
}

}  // namespace lmtfast::python
