// SPDX-License-Identifier: MIT
// One factor of a channel's scale: (constant t[slot] / sqrt(t[variance_slot] + eps)) or its inverse.
// The norm of a scale that stands alone is its largest entry.
#pragma once

#include <bit>
#include <cmath>

#include "ops/cuda/view.h"

namespace lmtfast::cuda {

struct ScaleFactor {
  double numerator, root, value;
};

__device__ inline double tensor_entry(uint64_t word, int64_t i) {
  return address_of<const float>(word)[has_bit(word, kSingleBit) ? 0 : i];
}

__device__ inline ScaleFactor factor_at(const lmtfast_scale_row& scale, const uint64_t* tensors,
                                        int64_t i) {
  const double numerator =
      scale.constant * (scale.slot < 0 ? 1.0 : tensor_entry(tensors[scale.slot], i));
  const double root = scale.variance_slot < 0
                          ? 1.0
                          : std::sqrt(tensor_entry(tensors[scale.variance_slot], i) + scale.eps);
  return {numerator, root, scale.inverse ? root / numerator : numerator / root};
}

// Place of the first entry of largest modulus, or of the first NaN if there is one; by the block.
__device__ inline int64_t largest_entry(const float* scales, int64_t length) {
  constexpr int64_t kNan = 0x7F800001, kLast = 0x7FFFFFFF;
  int64_t best = 0;
  for (int64_t i = threadIdx.x; i < length; i += kBlockThreads) {
    // The bits of moduli are in their order, NaN last; below them the first place is largest.
    const int64_t bits = std::bit_cast<uint32_t>(scales[i]) & kLast;
    const int64_t key = (bits < kNan ? bits : kNan) << 32 | (kLast - i);
    best = key > best ? key : best;
  }
  return kLast - (Team<true>::max(best) & kLast);
}

}  // namespace lmtfast::cuda
