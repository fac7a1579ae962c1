// SPDX-License-Identifier: MIT
// The CUDA entry points for Python, the same functions in lmtfast._C.cuda and in the emulated module
// of the tests. Buffers and streams arrive as integers; lmtfast/backends/cuda.py has checked them.
#include "lmtfast/cuda.h"

#include <pybind11/pybind11.h>

#include <array>

#include "python/status.h"

namespace py = pybind11;

namespace lmtfast::python {
namespace {

using Address = std::uintptr_t;

int64_t capability(int64_t device) {
  int64_t result = 0;
  raise_unless_ok(lmtfast_cuda_capability(device, &result));
  return result;
}

int64_t shared_bytes(int64_t device) {
  int64_t result = 0;
  raise_unless_ok(lmtfast_cuda_shared_bytes(device, &result));
  return result;
}

// The fields of lmtfast_margin_cross_entropy but for num_threads.
using Fields = std::array<int64_t, 12>;

lmtfast_margin_cross_entropy problem_of(const py::tuple& fields) {
  Fields f;
  if (fields.size() != f.size()) throw py::value_error("expected 12 fields; at problem");
  for (size_t i = 0; i < f.size(); ++i) f[i] = fields[i].cast<int64_t>();
  const auto at = [&](size_t i) { return address(static_cast<Address>(f[i])); };
  return {f[0],
          f[1],
          f[2],
          f[3],
          f[4],
          f[5],
          f[6],
          0,
          at(7),
          static_cast<const int64_t*>(at(8)),
          static_cast<const int64_t*>(at(9)),
          at(10),
          at(11)};
}

void margin_forward(const py::tuple& fields, Address loss, Address dlogits, Address scale,
                    Address stream) {
  const auto problem = problem_of(fields);
  raise_unless_ok(lmtfast_cuda_margin_cross_entropy_forward(
      &problem, address(loss), address(dlogits), address(scale), address(stream)));
}

void margin_backward(const py::tuple& fields, Address grad_loss, Address dlogits, Address scale,
                     Address grad_logits, Address grad_rows, Address grad_coefficient,
                     Address workspace, Address stream) {
  const auto problem = problem_of(fields);
  raise_unless_ok(lmtfast_cuda_margin_cross_entropy_backward(
      &problem, address(grad_loss), address(dlogits), address(scale), address(grad_logits),
      address(grad_rows), address(grad_coefficient), static_cast<int32_t*>(address(workspace)),
      address(stream)));
}

lmtfast_pair_norm pair_norm_of(int64_t dtype, int64_t k, int64_t d, int64_t u, int64_t stride,
                               Address weight, Address classes) {
  return {dtype, k, d, u, stride, address(weight), static_cast<const int64_t*>(address(classes))};
}

void pair_norm_forward(int64_t dtype, int64_t k, int64_t d, int64_t u, int64_t stride,
                       Address weight, Address classes, Address norms, Address stream) {
  const auto problem = pair_norm_of(dtype, k, d, u, stride, weight, classes);
  raise_unless_ok(lmtfast_cuda_pair_norm_forward(&problem, address(norms), address(stream)));
}

void pair_norm_vjp(int64_t dtype, int64_t k, int64_t d, int64_t u, int64_t stride, Address weight,
                   Address classes, Address norms, Address grad, Address own, Address grad_weight,
                   Address stream) {
  const auto problem = pair_norm_of(dtype, k, d, u, stride, weight, classes);
  raise_unless_ok(lmtfast_cuda_pair_norm_vjp(&problem, address(norms), address(grad), address(own),
                                             address(grad_weight), address(stream)));
}

}  // namespace

void bind_cuda(py::module_& m) {
  bind_cuda_spectral(m);
  m.def("capability", &capability, py::arg("device"));
  m.def("shared_bytes", &shared_bytes, py::arg("device"));
  m.def("margin_forward", &margin_forward, py::arg("problem"), py::arg("loss"), py::arg("dlogits"),
        py::arg("scale"), py::arg("stream"));
  m.def("margin_workspace", &lmtfast_cuda_margin_cross_entropy_workspace, py::arg("n"),
        py::arg("u"));
  m.def("margin_backward", &margin_backward, py::arg("problem"), py::arg("grad_loss"),
        py::arg("dlogits"), py::arg("scale"), py::arg("grad_logits"), py::arg("grad_rows"),
        py::arg("grad_coefficient"), py::arg("workspace"), py::arg("stream"));
  m.def("pair_norm_forward", &pair_norm_forward, py::arg("dtype"), py::arg("k"), py::arg("d"),
        py::arg("u"), py::arg("weight_stride"), py::arg("weight"), py::arg("classes"),
        py::arg("norms"), py::arg("stream"));
  m.def("pair_norm_vjp", &pair_norm_vjp, py::arg("dtype"), py::arg("k"), py::arg("d"), py::arg("u"),
        py::arg("weight_stride"), py::arg("weight"), py::arg("classes"), py::arg("norms"),
        py::arg("grad"), py::arg("own"), py::arg("grad_weight"), py::arg("stream"));
}

}  // namespace lmtfast::python
