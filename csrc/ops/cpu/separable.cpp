// SPDX-License-Identifier: MIT
#include "ops/spectral.h"

namespace lmtfast::cpu {

void separable_step(const SpectralStep& step) {
  throw_invalid("another engine", step.which.front(), "separable");
}

void separable_vjp(const SpectralVjp& vjp) {
  throw_invalid("another engine", vjp.which.front(), "separable");
}

}  // namespace lmtfast::cpu
