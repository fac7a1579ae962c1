// SPDX-License-Identifier: MIT
#include "core/device.h"
#include "ops/cuda/device.h"

namespace lmtfast::cuda {

namespace {

int attribute(cudaDeviceAttr which, int64_t device) {
  int count = 0, value = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  require(device >= 0 && device < count, "a device of this machine", device, "device");
  check(cudaDeviceGetAttribute(&value, which, static_cast<int>(device)), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

int64_t capability(int64_t device) {
  return attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

int64_t shared_bytes(int64_t device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

void zero(void* data, int64_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
        "cudaMemsetAsync");
}

}  // namespace lmtfast::cuda
