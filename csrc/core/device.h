// SPDX-License-Identifier: MIT
// What the CUDA sources are written against: the CUDA runtime, or its emulation on the host
// (tests/csrc/cuda_emulation.h), which runs the same kernels where there is no GPU.
#pragma once

#include <cstddef>
#include <string>

#include "core/device_types.h"
#include "core/status.h"

#if defined(LMTFAST_CUDA_EMULATION)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

// Shared memory of a block. LMTFAST_SHARED(float, tile, [8][33]) declares `tile`; the dynamic part
// is 16-byte aligned, one for all who declare it.
#if defined(LMTFAST_CUDA_EMULATION)
#define LMTFAST_SHARED(type, name, extents)                                           \
  using name##_array = type extents;                                                  \
  static thread_local ::lmtfast::emulation::Shared<name##_array> name##_of_any_block; \
  name##_array& name = name##_of_any_block.of_this_block()
#define LMTFAST_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::lmtfast::emulation::dynamic_shared())
#else
#define LMTFAST_SHARED(type, name, extents) __shared__ __align__(16) type name extents
#define LMTFAST_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char lmtfast_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(lmtfast_dynamic_shared)
#endif

// Before an access that the hardware does in one piece: a fault of the emulation where the address is
// no multiple of `bytes`, as it would be of the device.
#if defined(LMTFAST_CUDA_EMULATION)
#define LMTFAST_ALIGNED(pointer, bytes) \
  ::lmtfast::emulation::require_aligned(pointer, bytes, __FILE__, __LINE__)
#else
#define LMTFAST_ALIGNED(pointer, bytes) static_cast<void>(0)
#endif

// On a device: an integer that the compiler may not know more of, nor of what follows from it.
#if defined(__CUDA_ARCH__)
#define LMTFAST_OPAQUE(x) asm volatile("" : "+r"(x))
#else
#define LMTFAST_OPAQUE(x) static_cast<void>(x)
#endif

// LMTFAST_LAUNCH((kernel<T, 4>), grid, block, shared_bytes, stream, arguments...): the only way
// kernels are started. A grid of no blocks is no work.
#define LMTFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::lmtfast::cuda::launch(#kernel, kernel, grid, block, shared_bytes,  \
                          stream __VA_OPT__(, ) __VA_ARGS__)

namespace lmtfast::cuda {

inline void check(cudaError_t status, const char* where) {
  if (status == cudaSuccess) return;
  // Without this read the next call would report the error again.
  static_cast<void>(cudaGetLastError());
  throw DeviceError(std::string(where) + ": " + cudaGetErrorString(status));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, [[maybe_unused]] Stream stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(LMTFAST_CUDA_EMULATION)
  try {
    emulation::launch(name, kernel, grid, block, shared_bytes, arguments...);
  } catch (const std::runtime_error& error) {
    throw DeviceError(error.what());
  }
#else
  // 48 KiB, less what a kernel may have of static shared memory.
  constexpr size_t kWithoutAsking = 24 << 10;
  if (shared_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
#endif
}

}  // namespace lmtfast::cuda
