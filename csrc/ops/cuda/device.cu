// SPDX-License-Identifier: MIT
#include "core/device.h"
#include "ops/cuda/device.h"

namespace lmtfast::cuda {

int64_t capability(int64_t device) {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  require(device >= 0 && device < count, "a device of this machine", device, "device");
  int major = 0, minor = 0;
  const int which = static_cast<int>(device);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, which), "capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, which), "capability");
  return major * 10 + minor;
}

void zero(void* data, int64_t bytes, Stream stream) {
  if (bytes == 0) return;
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
        "cudaMemsetAsync");
}

}  // namespace lmtfast::cuda
