// SPDX-License-Identifier: MIT
// Rows of a sum of two outer products, as the gradient of a singular value is one.
#pragma once

#include <cstdint>

#include "core/dispatch.h"

namespace lmtfast::cpu {

// out[i] = a x[i] + b y[i] for i in [0, n).
using OuterRow = void (*)(float a, const float* x, float b, const float* y, int64_t n, float* out);

struct OuterKernels {
  OuterRow store;
  OuterRow add;     // out += instead
  OuterRow stream;  // past the caches, for more than they hold
};

const OuterKernels& outer_kernels(Isa isa);
// Streamed entries are visible to other threads after this.
void end_streaming();

}  // namespace lmtfast::cpu
