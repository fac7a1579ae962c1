// SPDX-License-Identifier: MIT
#include "core/status.h"

#include <new>

namespace lmtfast {
namespace {

// A fixed buffer: reporting an exhausted memory must not allocate.
constexpr size_t kMessageBytes = 512;
thread_local char message[kMessageBytes] = "";

void set_message(const char* text) noexcept {
  size_t i = 0;
  for (; i + 1 < kMessageBytes && text[i] != '\0'; ++i) message[i] = text[i];
  message[i] = '\0';
}

}  // namespace

void throw_invalid(const std::string& expected, int64_t got, const std::string& where) {
  throw InvalidArgument("expected " + expected + "; got " + std::to_string(got) + "; at " + where);
}

const char* last_error() noexcept { return message; }

lmtfast_status record_current_exception() noexcept {
  try {
    throw;
  } catch (const InvalidArgument& error) {
    set_message(error.what());
    return LMTFAST_INVALID_ARGUMENT;
  } catch (const std::bad_alloc&) {
    set_message("out of memory for scratch buffers");
    return LMTFAST_OUT_OF_MEMORY;
  } catch (const DeviceError& error) {
    set_message(error.what());
    return LMTFAST_DEVICE_ERROR;
  } catch (const std::exception& error) {
    set_message(error.what());
    return LMTFAST_INTERNAL_ERROR;
  } catch (...) {
    set_message("unknown internal error");
    return LMTFAST_INTERNAL_ERROR;
  }
}

}  // namespace lmtfast
