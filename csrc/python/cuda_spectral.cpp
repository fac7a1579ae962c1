// SPDX-License-Identifier: MIT
// Spectral norms on a CUDA device for Python: a plan owns its table, tensors arrive as flat integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "python/tables.h"

namespace py = pybind11;

namespace lmtfast::python {
namespace {

class Plan {
 public:
  Plan(const Integers& rows, const Integers& scales, const Integers& tape, int64_t features,
       int64_t total, int64_t scale_size, int64_t saved_size, int64_t state_size,
       int64_t shared_bytes) {
    const auto row = rows_of<lmtfast_op_row>(rows, "rows");
    const auto scale = rows_of<lmtfast_scale_row>(scales, "scales");
    const auto step = rows_of<lmtfast_instruction>(tape, "tape");
    const auto count = [](const auto& items) { return static_cast<int64_t>(items.size()); };
    const lmtfast_network network{row.data(),   scale.data(), step.data(), count(row),
                                  count(scale), count(step),  features,    total,
                                  scale_size,   saved_size,   state_size};
    int64_t size = 0;
    raise_unless_ok(lmtfast_cuda_plan(&network, shared_bytes, nullptr, 0, &size, &workspace_));
    table_.resize(static_cast<size_t>(size));
    raise_unless_ok(
        lmtfast_cuda_plan(&network, shared_bytes, table_.data(), size, &size, &workspace_));
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  int64_t table_size() const { return static_cast<int64_t>(table_.size()); }
  int64_t workspace_bytes() const { return workspace_; }
  void copy_table(Address to) const {
    std::memcpy(address(to), table_.data(), table_.size() * sizeof(int64_t));
  }

  // Tensors are (address, dtype, size, tap major) each.
  void step(Address device_plan, const Integers& tensors, Address state, Address new_state,
            Address sigmas, Address saved, Address workspace, Address stream) const {
    const auto views = rows_of<lmtfast_tensor>(tensors, "tensors");
    raise_unless_ok(lmtfast_cuda_spectral_step(
        table_.data(), static_cast<int64_t*>(address(device_plan)), views.data(),
        static_cast<int64_t>(views.size()), floats(state), floats(new_state), floats(sigmas),
        floats(saved), address(workspace), address(stream)));
  }

  void vjp(Address device_plan, const Integers& tensors, Address saved, Address grad_sigmas,
           const Integers& grads, Address workspace, Address stream) const {
    const auto views = rows_of<lmtfast_tensor>(tensors, "tensors");
    const auto outputs = rows_of<lmtfast_tensor>(grads, "grads");
    if (outputs.size() != views.size()) {
      throw py::value_error("expected one gradient per tensor; at grads");
    }
    raise_unless_ok(lmtfast_cuda_spectral_vjp(
        table_.data(), static_cast<int64_t*>(address(device_plan)), views.data(),
        static_cast<int64_t>(views.size()), floats(saved), floats(grad_sigmas), outputs.data(),
        address(workspace), address(stream)));
  }

  void compose(Address device_plan, Address sigmas, Address values, Address jacobian,
               Address workspace, Address stream) const {
    raise_unless_ok(lmtfast_cuda_compose(table_.data(), static_cast<int64_t*>(address(device_plan)),
                                         floats(sigmas), floats(values), floats(jacobian),
                                         address(workspace), address(stream)));
  }

 private:
  Integers table_;
  int64_t workspace_ = 0;
};

}  // namespace

void bind_cuda_spectral(py::module_& m) {
  py::class_<Plan>(m, "Plan", py::module_local(), "Packed tables of one network and its launches.")
      .def(py::init<const Integers&, const Integers&, const Integers&, int64_t, int64_t, int64_t,
                    int64_t, int64_t, int64_t>(),
           py::arg("rows"), py::arg("scales"), py::arg("tape"), py::arg("features"),
           py::arg("total"), py::arg("scale_size"), py::arg("saved_size"), py::arg("state_size"),
           py::arg("shared_bytes"))
      .def_property_readonly("table_size", &Plan::table_size)
      .def_property_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def("copy_table", &Plan::copy_table, py::arg("to"))
      .def("step", &Plan::step, py::arg("device_plan"), py::arg("tensors"), py::arg("state"),
           py::arg("new_state"), py::arg("sigmas"), py::arg("saved"), py::arg("workspace"),
           py::arg("stream"))
      .def("vjp", &Plan::vjp, py::arg("device_plan"), py::arg("tensors"), py::arg("saved"),
           py::arg("grad_sigmas"), py::arg("grads"), py::arg("workspace"), py::arg("stream"))
      .def("compose", &Plan::compose, py::arg("device_plan"), py::arg("sigmas"), py::arg("values"),
           py::arg("jacobian"), py::arg("workspace"), py::arg("stream"));
}

}  // namespace lmtfast::python
