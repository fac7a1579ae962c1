// SPDX-License-Identifier: MIT
// Power steps at many frequencies for Python; lmtfast/backends/native_spectral.py has checked dtype,
// device, shape and strides.
#include "python/status.h"

namespace py = pybind11;

namespace lmtfast::python {
namespace {

using Address = std::uintptr_t;

void power_vectors(int64_t groups, int64_t rows, int64_t channels, int64_t taps, int64_t phases,
                   int64_t frequencies, int64_t steps, Address acting, Address phase, Address terms,
                   Address start, Address norms, Address vectors, int64_t num_threads) {
  const lmtfast_power_problem problem{groups, rows, channels, taps, phases, frequencies, steps};
  lmtfast_status status;
  {
    const py::gil_scoped_release release;
    status = lmtfast_power_vectors(
        &problem, static_cast<const float*>(address(acting)),
        static_cast<const int64_t*>(address(phase)), static_cast<const float*>(address(terms)),
        static_cast<const float*>(address(start)), static_cast<float*>(address(norms)),
        static_cast<float*>(address(vectors)), num_threads);
  }
  raise_unless_ok(status);
}

}  // namespace

void bind_power_vectors(py::module_& m) {
  m.def("power_vectors", &power_vectors, py::arg("groups"), py::arg("rows"), py::arg("channels"),
        py::arg("taps"), py::arg("phases"), py::arg("frequencies"), py::arg("steps"),
        py::arg("acting"), py::arg("phase"), py::arg("terms"), py::arg("start"), py::arg("norms"),
        py::arg("vectors"), py::arg("num_threads"));
}

}  // namespace lmtfast::python
