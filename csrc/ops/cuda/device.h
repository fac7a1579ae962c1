// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

namespace lmtfast::cuda {

// Compute capability, major times ten plus minor. Throws DeviceError where there is no such device.
int64_t capability(int64_t device);

}  // namespace lmtfast::cuda
