// SPDX-License-Identifier: MIT
// Runs CUDA kernels on the host, one block at a time, every thread a fiber: csrc/ops/cuda compiles
// against this header instead of cuda_runtime.h, without a change, and is tested where no GPU is.
//
// A launch fails, with the kernel's name and the lines that threads wait at, where a real one could
// hang or is undefined: a barrier that some threads pass and others do not, at different lines, or
// after a thread has returned; a warp instruction that some lanes skip (masks must be full); a
// misaligned vector access; a write past the dynamic shared memory, or more of it than the device has.
// Shared memory starts each block as 0xFF bytes (NaN), so a value nobody wrote shows. With a seed, blocks and, between
// two barriers, threads run in a random order: a missing barrier or a dependence between blocks
// changes the result. Not modelled: memory ordering within one warp instruction, caches, time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// One device, of compute capability 9.0, that never fails.
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
namespace lmtfast::emulation {
// Shared memory that a block may ask for, static memory aside; 227 KiB unless set.
int64_t shared_limit();
void set_shared_limit(int64_t bytes);
// Launches since the last call with `reset`, blocks of no kernel aside.
int64_t count_launches(bool reset);
}  // namespace lmtfast::emulation
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor ? 0
           : attribute == cudaDevAttrMultiProcessorCount
               ? 3
               : static_cast<int>(lmtfast::emulation::shared_limit());
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace lmtfast::emulation {

constexpr int kWarp = 32;
constexpr size_t kPayloadBytes = 160;

// Order in which blocks and threads run; 0 is ascending.
void set_order(uint64_t seed);

// Runs `body` once per thread of the grid. Throws std::runtime_error on what is listed above.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
         const std::function<void()>& body);

struct Place {
  dim3 thread, block, block_size, grid;
};
const Place& place();

// Reports a fault of the kernel that is running; does not return.
[[noreturn]] void fault(const char* what, const char* file, int line);

void sync_threads(const char* file, int line);

// All lanes of the warp meet; afterwards payload_of(lane) is what that lane brought, until this
// lane's next exchange.
void exchange(unsigned mask, const void* payload, size_t bytes, const char* file, int line);
const void* payload_of(int lane, const char* file, int line);
int lane();

void* dynamic_shared();
// Number of the block that runs, counted over all launches.
uint64_t block_serial();

inline void require_aligned(const void* pointer, size_t bytes, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fault("misaligned access", file, line);
}

// Static shared memory: one per block, since blocks run one after another; poisoned for each.
template <class T>
struct Shared {
  alignas(128) T value;
  uint64_t serial;

  T& of_this_block() {
    if (serial != block_serial()) {
      serial = block_serial();
      std::memset(static_cast<void*>(&value), 0xFF, sizeof(T));
    }
    return value;
  }
};

template <class T>
T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  exchange(mask, &value, sizeof(T), file, line);
  T result;
  std::memcpy(&result, payload_of(source, file, line), sizeof(T));
  return result;
}

template <class T>
T shuffle_down(unsigned mask, T value, int delta, const char* file, int line) {
  const int source = lane() + delta;
  return shuffle(mask, value, source < kWarp ? source : lane(), file, line);
}

inline unsigned ballot(unsigned mask, bool predicate, const char* file, int line) {
  exchange(mask, &predicate, sizeof(predicate), file, line);
  unsigned result = 0;
  for (int i = 0; i < kWarp; ++i) {
    bool set;
    std::memcpy(&set, payload_of(i, file, line), sizeof(set));
    result |= static_cast<unsigned>(set) << i;
  }
  return result;
}

template <class T>
T add(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, Arguments&&... arguments) {
  run(name, grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace lmtfast::emulation

#define threadIdx (::lmtfast::emulation::place().thread)
#define blockIdx (::lmtfast::emulation::place().block)
#define blockDim (::lmtfast::emulation::place().block_size)
#define gridDim (::lmtfast::emulation::place().grid)
#define __syncthreads() ::lmtfast::emulation::sync_threads(__FILE__, __LINE__)
#define __syncwarp() ::lmtfast::emulation::exchange(0xFFFFFFFFu, nullptr, 0, __FILE__, __LINE__)
#define __shfl_sync(mask, value, source) \
  ::lmtfast::emulation::shuffle(mask, value, source, __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, delta) \
  ::lmtfast::emulation::shuffle_down(mask, value, delta, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, bits)                                                    \
  ::lmtfast::emulation::shuffle(mask, value, ::lmtfast::emulation::lane() ^ (bits), __FILE__, \
                                __LINE__)
#define __ballot_sync(mask, predicate) \
  ::lmtfast::emulation::ballot(mask, predicate, __FILE__, __LINE__)
#define __threadfence() static_cast<void>(0)

inline int atomicAdd(int* address, int value) { return lmtfast::emulation::add(address, value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return lmtfast::emulation::add(address, value);
}
inline float atomicAdd(float* address, float value) {
  return lmtfast::emulation::add(address, value);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
