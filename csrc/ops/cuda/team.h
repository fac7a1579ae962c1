// SPDX-License-Identifier: MIT
// The threads that share one row, and their reductions: a fixed tree, so the result depends on the
// team's size and on nothing else.
#pragma once

#include "core/device.h"

namespace lmtfast::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// kBlock: the whole block is one team; otherwise every warp is. blockDim.x is a multiple of 32.
template <bool kBlock>
struct Team {
  static __device__ int size() { return kBlock ? static_cast<int>(blockDim.x) : kWarpSize; }
  static __device__ int rank() {
    return static_cast<int>(kBlock ? threadIdx.x : threadIdx.x % kWarpSize);
  }
  static __device__ int number() { return kBlock ? 0 : static_cast<int>(threadIdx.x) / kWarpSize; }
  static __device__ int per_block() {
    return kBlock ? 1 : static_cast<int>(blockDim.x) / kWarpSize;
  }

  // Every thread of the team must call; all get the result. `combine` is commutative.
  template <class T, class Combine>
  static __device__ T reduce(T x, Combine combine) {
    for (int bits = kWarpSize / 2; bits > 0; bits /= 2) {
      x = combine(x, __shfl_xor_sync(kAllLanes, x, bits));
    }
    if constexpr (kBlock) {
      T* part = warp_slots<T>();
      const int warps = static_cast<int>(blockDim.x) / kWarpSize;
      // Whoever still reads the parts of the reduction before.
      __syncthreads();
      if (threadIdx.x % kWarpSize == 0) part[threadIdx.x / kWarpSize] = x;
      __syncthreads();
      x = part[0];
      for (int w = 1; w < warps; ++w) x = combine(x, part[w]);
    }
    return x;
  }

  template <class T>
  static __device__ T sum(T x) {
    return reduce(x, [](T a, T b) { return a + b; });
  }
  // NaN never wins; a team without a number returns what it started from.
  template <class T>
  static __device__ T max(T x) {
    return reduce(x, [](T a, T b) { return b > a ? b : a; });
  }
  template <class T>
  static __device__ T min(T x) {
    return reduce(x, [](T a, T b) { return b < a ? b : a; });
  }

 private:
  template <class T>
  static __device__ T* warp_slots() {
    LMTFAST_SHARED(T, part, [kWarpSize]);
    return part;
  }
};

// Sums values over groups of 2 kHalf lanes; lane i of each gets the sum of number i. Each step halves
// the numbers that a lane still holds.
template <int kHalf, int kCount>
__device__ float scattered_sum(float (&values)[kCount]) {
  const bool upper = (Team<false>::rank() & kHalf) != 0;
  LMTFAST_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    const float mine = upper ? values[i + kHalf] : values[i];
    const float theirs = upper ? values[i] : values[i + kHalf];
    values[i] = mine + __shfl_xor_sync(kAllLanes, theirs, kHalf);
  }
  if constexpr (kHalf > 1) {
    return scattered_sum<kHalf / 2>(values);
  } else {
    return values[0];
  }
}

// Whether this block is the last of `blocks` that count here; to it all they wrote is visible. The
// whole block must call.
__device__ inline bool last_of(int* counter, int32_t blocks) {
  LMTFAST_SHARED(int, last, [1]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last[0] = atomicAdd(counter, 1) == blocks - 1;
  __syncthreads();
  if (last[0] == 0) return false;
  __threadfence();
  return true;
}

}  // namespace lmtfast::cuda
