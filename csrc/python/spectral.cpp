// SPDX-License-Identifier: MIT
// Spectral norms for Python: the packed tables are copied once, tensors arrive as flat integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/tables.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace lmtfast::python {
namespace {

// Gradients are fresh memory and are written whole: large pages spare a fault per 4 KiB, which can
// cost more than the writing. Advice only; NumPy gives it for its own arrays from this size on.
void advise_large_pages([[maybe_unused]] const lmtfast_tensor& tensor) {
#if defined(__linux__)
  constexpr Address kPage = Address{1} << 21, kLeast = Address{1} << 22;
  const Address bytes = static_cast<Address>(tensor.size) * sizeof(float);
  if (tensor.data == nullptr || bytes < kLeast) return;
  const Address begin = reinterpret_cast<Address>(tensor.data);
  const Address first = (begin + kPage - 1) / kPage * kPage, end = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// The tables of one network; owns its copies.
class Network {
 public:
  Network(const Integers& rows, const Integers& scales, const Integers& tape, int64_t features,
          int64_t total, int64_t scale_size, int64_t saved_size, int64_t state_size)
      : rows_(rows_of<lmtfast_op_row>(rows, "rows")),
        scales_(rows_of<lmtfast_scale_row>(scales, "scales")),
        tape_(rows_of<lmtfast_instruction>(tape, "tape")),
        view_{rows_.data(),
              scales_.data(),
              tape_.data(),
              static_cast<int64_t>(rows_.size()),
              static_cast<int64_t>(scales_.size()),
              static_cast<int64_t>(tape_.size()),
              features,
              total,
              scale_size,
              saved_size,
              state_size} {}
  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  // Tensors are (address, dtype, size, tap major) each.
  void step(const Integers& tensors, Address state, Address new_state, Address sigmas,
            Address saved, int64_t num_threads) const {
    const auto views = rows_of<lmtfast_tensor>(tensors, "tensors");
    lmtfast_status status;
    {
      const py::gil_scoped_release release;
      status = lmtfast_spectral_step(&view_, views.data(), static_cast<int64_t>(views.size()),
                                     floats(state), floats(new_state), floats(sigmas),
                                     floats(saved), num_threads);
    }
    raise_unless_ok(status);
  }

  void vjp(const Integers& tensors, Address saved, Address grad_sigmas, const Integers& grads,
           int64_t num_threads) const {
    const auto views = rows_of<lmtfast_tensor>(tensors, "tensors");
    const auto outputs = rows_of<lmtfast_tensor>(grads, "grads");
    if (outputs.size() != views.size()) {
      throw py::value_error("expected one gradient per tensor; at grads");
    }
    for (const lmtfast_tensor& output : outputs) advise_large_pages(output);
    lmtfast_status status;
    {
      const py::gil_scoped_release release;
      status =
          lmtfast_spectral_vjp(&view_, views.data(), static_cast<int64_t>(views.size()),
                               floats(saved), floats(grad_sigmas), outputs.data(), num_threads);
    }
    raise_unless_ok(status);
  }

  void matvec(int64_t row, const Integers& tensors, Address v, Address u,
              int64_t num_threads) const {
    product(lmtfast_matvec, row, tensors, v, u, num_threads);
  }

  void rmatvec(int64_t row, const Integers& tensors, Address u, Address v,
               int64_t num_threads) const {
    product(lmtfast_rmatvec, row, tensors, u, v, num_threads);
  }

  void weight_vjp(int64_t row, const Integers& tensors, Address u, Address v, const Integers& grads,
                  int64_t num_threads) const {
    const auto views = rows_of<lmtfast_tensor>(tensors, "tensors");
    const auto outputs = rows_of<lmtfast_tensor>(grads, "grads");
    if (outputs.size() != views.size()) {
      throw py::value_error("expected one gradient per tensor; at grads");
    }
    lmtfast_status status;
    {
      const py::gil_scoped_release release;
      status = lmtfast_weight_vjp(&view_, row, views.data(), static_cast<int64_t>(views.size()),
                                  floats(u), floats(v), outputs.data(), num_threads);
    }
    raise_unless_ok(status);
  }

  void compose(Address sigmas, Address values, Address jacobian) const {
    raise_unless_ok(lmtfast_compose(&view_, floats(sigmas), floats(values), floats(jacobian)));
  }

 private:
  void product(decltype(lmtfast_matvec)* function, int64_t row, const Integers& tensors, Address x,
               Address y, int64_t num_threads) const {
    const auto views = rows_of<lmtfast_tensor>(tensors, "tensors");
    lmtfast_status status;
    {
      const py::gil_scoped_release release;
      status = function(&view_, row, views.data(), static_cast<int64_t>(views.size()), floats(x),
                        floats(y), num_threads);
    }
    raise_unless_ok(status);
  }

  std::vector<lmtfast_op_row> rows_;
  std::vector<lmtfast_scale_row> scales_;
  std::vector<lmtfast_instruction> tape_;
  lmtfast_network view_;
};

}  // namespace

void bind_spectral(py::module_& m) {
  m.attr("OP_ROW_FIELDS") = LMTFAST_OP_ROW_FIELDS;
  m.attr("SCALE_ROW_FIELDS") = LMTFAST_SCALE_ROW_FIELDS;
  m.attr("INSTRUCTION_FIELDS") = LMTFAST_INSTRUCTION_FIELDS;
  py::class_<Network>(m, "Network", "Packed tables of one network; see lmtfast/table.py.")
      .def(py::init<const Integers&, const Integers&, const Integers&, int64_t, int64_t, int64_t,
                    int64_t, int64_t>(),
           py::arg("rows"), py::arg("scales"), py::arg("tape"), py::arg("features"),
           py::arg("total"), py::arg("scale_size"), py::arg("saved_size"), py::arg("state_size"))
      .def("step", &Network::step, py::arg("tensors"), py::arg("state"), py::arg("new_state"),
           py::arg("sigmas"), py::arg("saved"), py::arg("num_threads"))
      .def("vjp", &Network::vjp, py::arg("tensors"), py::arg("saved"), py::arg("grad_sigmas"),
           py::arg("grads"), py::arg("num_threads"))
      .def("matvec", &Network::matvec, py::arg("row"), py::arg("tensors"), py::arg("v"),
           py::arg("u"), py::arg("num_threads"))
      .def("rmatvec", &Network::rmatvec, py::arg("row"), py::arg("tensors"), py::arg("u"),
           py::arg("v"), py::arg("num_threads"))
      .def("weight_vjp", &Network::weight_vjp, py::arg("row"), py::arg("tensors"), py::arg("u"),
           py::arg("v"), py::arg("grads"), py::arg("num_threads"))
      .def("compose", &Network::compose, py::arg("sigmas"), py::arg("values"), py::arg("jacobian"));
}

}  // namespace lmtfast::python
