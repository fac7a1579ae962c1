// SPDX-License-Identifier: MIT
// lmtfast's CUDA kernels as a Python module that runs on the CPU. Built by the tests, never
// installed; lmtfast/backends/cuda.py takes it in the place of lmtfast._C.cuda.
#include <pybind11/pybind11.h>

#include "cuda_emulation.h"
#include "python/status.h"

PYBIND11_MODULE(_C_emulated, m) {
  m.attr("ABI_VERSION") = lmtfast_abi_version();
  m.attr("DEVICE") = "cpu";
  m.def("set_order", &lmtfast::emulation::set_order, pybind11::arg("seed"),
        "Order in which blocks and threads run; 0 is ascending.");
  m.def("set_shared_limit", &lmtfast::emulation::set_shared_limit, pybind11::arg("bytes"),
        "Shared memory that a block may ask for.");
  m.def("count_launches", &lmtfast::emulation::count_launches, pybind11::arg("reset") = false,
        "Launches since the count was reset.");
  lmtfast::python::bind_cuda(m);
}
