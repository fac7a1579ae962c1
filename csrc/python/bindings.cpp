// SPDX-License-Identifier: MIT
// lmtfast._C: the C ABI for Python. Buffers arrive as integer addresses, so no framework's headers
// are needed; the caller (lmtfast/backends/native.py) has checked dtype, device, shape and strides.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "lmtfast/lmtfast.h"
#include "python/status.h"

namespace py = pybind11;

namespace {

using lmtfast::python::address;
using lmtfast::python::raise_unless_ok;

lmtfast_margin_cross_entropy problem_of(int64_t dtype, int64_t member, int64_t n, int64_t k,
                                        int64_t u, int64_t logits_stride, int64_t rows_stride,
                                        int64_t num_threads, std::uintptr_t logits,
                                        std::uintptr_t target, std::uintptr_t row_index,
                                        std::uintptr_t rows, std::uintptr_t coefficient) {
  return {dtype,
          member,
          n,
          k,
          u,
          logits_stride,
          rows_stride,
          num_threads,
          address(logits),
          static_cast<const int64_t*>(address(target)),
          static_cast<const int64_t*>(address(row_index)),
          address(rows),
          address(coefficient)};
}

using Problem = lmtfast_margin_cross_entropy;

void forward(const Problem& problem, std::uintptr_t loss, std::uintptr_t dlogits,
             std::uintptr_t scale) {
  lmtfast_status status;
  {
    const py::gil_scoped_release release;
    status = lmtfast_margin_cross_entropy_forward(&problem, address(loss), address(dlogits),
                                                  address(scale));
  }
  raise_unless_ok(status);
}

void backward(const Problem& problem, std::uintptr_t grad_loss, std::uintptr_t dlogits,
              std::uintptr_t scale, std::uintptr_t grad_logits, std::uintptr_t grad_rows,
              std::uintptr_t grad_coefficient) {
  lmtfast_status status;
  {
    const py::gil_scoped_release release;
    status = lmtfast_margin_cross_entropy_backward(&problem, address(grad_loss), address(dlogits),
                                                   address(scale), address(grad_logits),
                                                   address(grad_rows), address(grad_coefficient));
  }
  raise_unless_ok(status);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "C ABI of lmtfast over integer addresses. Not for direct use: call lmtfast.backends.native.";
  m.attr("ABI_VERSION") = lmtfast_abi_version();
  lmtfast::python::bind_pair_norm(m);
  lmtfast::python::bind_power_vectors(m);
  lmtfast::python::bind_spectral(m);
  auto cuda = m.def_submodule("cuda", "The CUDA entry points; see lmtfast.backends.cuda.");
  cuda.attr("DEVICE") = "cuda";
  lmtfast::python::bind_cuda(cuda);
  py::class_<Problem>(
      m, "MarginCrossEntropy",
      "Sizes, strides (in elements) and addresses; holds no reference to the buffers.")
      .def(py::init(&problem_of), py::arg("dtype"), py::arg("member"), py::arg("n"), py::arg("k"),
           py::arg("u"), py::arg("logits_stride"), py::arg("rows_stride"), py::arg("num_threads"),
           py::arg("logits"), py::arg("target"), py::arg("row_index"), py::arg("rows"),
           py::arg("coefficient"))
      .def("forward", &forward, py::arg("loss"), py::arg("dlogits"), py::arg("scale"))
      .def("backward", &backward, py::arg("grad_loss"), py::arg("dlogits"), py::arg("scale"),
           py::arg("grad_logits"), py::arg("grad_rows"), py::arg("grad_coefficient"));
}
