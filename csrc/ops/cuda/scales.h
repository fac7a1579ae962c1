// SPDX-License-Identifier: MIT
// One factor of a channel's scale: (constant t[slot] / sqrt(t[variance_slot] + eps)) or its inverse.
#pragma once

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

}  // namespace lmtfast::cuda
