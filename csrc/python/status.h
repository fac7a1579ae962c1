// SPDX-License-Identifier: MIT
// What every binding needs: addresses as integers, status codes as exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <stdexcept>

#include "lmtfast/lmtfast.h"

namespace lmtfast::python {

inline void* address(std::uintptr_t value) { return reinterpret_cast<void*>(value); }

inline void raise_unless_ok(lmtfast_status status) {
  if (status == LMTFAST_OK) return;
  if (status == LMTFAST_INVALID_ARGUMENT) throw pybind11::value_error(lmtfast_last_error());
  if (status == LMTFAST_OUT_OF_MEMORY) throw std::bad_alloc();
  throw std::runtime_error(lmtfast_last_error());
}

void bind_cuda(pybind11::module_& m);
void bind_cuda_spectral(pybind11::module_& m);
void bind_pair_norm(pybind11::module_& m);
void bind_power_vectors(pybind11::module_& m);
void bind_spectral(pybind11::module_& m);

}  // namespace lmtfast::python
