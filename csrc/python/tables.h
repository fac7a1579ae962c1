// SPDX-License-Identifier: MIT
// Packed tables and buffers as Python brings them: flat lists of integers, addresses.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "python/status.h"

namespace lmtfast::python {

using Integers = std::vector<int64_t>;
using Address = std::uintptr_t;

inline float* floats(Address value) { return static_cast<float*>(address(value)); }

template <class Row>
std::vector<Row> rows_of(const Integers& flat, const char* name) {
  if (flat.size() * sizeof(int64_t) % sizeof(Row) != 0) {
    throw pybind11::value_error("expected whole rows; got " + std::to_string(flat.size()) +
                                " integers; at " + name);
  }
  std::vector<Row> rows(flat.size() * sizeof(int64_t) / sizeof(Row));
  if (!flat.empty()) std::memcpy(rows.data(), flat.data(), flat.size() * sizeof(int64_t));
  return rows;
}

}  // namespace lmtfast::python
