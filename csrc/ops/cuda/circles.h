// SPDX-License-Identifier: MIT
// Operators whose scales share tensors, so that the block that completes their weight gradients can
// go on to those of the scales, and nobody else writes them.
#pragma once

#include <vector>

#include "ops/cuda/plan.h"

namespace lmtfast::cuda {

struct Circles {
  std::vector<Circle> circles;
  std::vector<Item> sums, slots;
};

// Sets the circle of each operator; `rounds` are the blocks of the weight gradients.
Circles make_circles(const lmtfast_network& net, std::vector<OpWork>& work,
                     const std::vector<std::vector<Item>>& rounds);

}  // namespace lmtfast::cuda
