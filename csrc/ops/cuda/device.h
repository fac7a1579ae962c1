// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include "core/device_types.h"

namespace lmtfast::cuda {

// Compute capability, major times ten plus minor. Throws DeviceError where there is no such device.
int64_t capability(int64_t device);

// Shared memory in bytes that a block may ask for.
int64_t shared_bytes(int64_t device);

// Queues zeros.
void zero(void* data, int64_t bytes, Stream stream);

}  // namespace lmtfast::cuda
