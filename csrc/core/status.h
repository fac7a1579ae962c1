// SPDX-License-Identifier: MIT
// Errors inside the core are exceptions; the C ABI turns them into a status code and this thread's
// message.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "lmtfast/lmtfast.h"

namespace lmtfast {

class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// The CUDA runtime reports an error, or this build or machine has none.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Message in the house order: expected, got, where.
[[noreturn]] void throw_invalid(const std::string& expected, int64_t got, const std::string& where);

inline void require(bool ok, const char* expected, int64_t got, const char* where) {
  if (!ok) throw_invalid(expected, got, where);
}

const char* last_error() noexcept;
lmtfast_status record_current_exception() noexcept;

// Runs `body` and reports what it throws; nothing ever unwinds through the C ABI.
template <class Body>
lmtfast_status guarded(Body&& body) noexcept {
  try {
    body();
    return LMTFAST_OK;
  } catch (...) {
    return record_current_exception();
  }
}

}  // namespace lmtfast
