// SPDX-License-Identifier: MIT
#include "ops/spectral.h"

namespace lmtfast::cpu {

void operator_step(const SpectralStep& step) {
  throw_invalid("another engine", step.which.front(), "operator");
}

void operator_vjp(const SpectralVjp& vjp) {
  throw_invalid("another engine", vjp.which.front(), "operator");
}

}  // namespace lmtfast::cpu
