// SPDX-License-Identifier: MIT
#include "ops/spectral.h"

namespace lmtfast::cpu {

void symbol_step(const SpectralStep& step) {
  throw_invalid("another engine", step.which.front(), "symbol");
}

void symbol_vjp(const SpectralVjp& vjp) {
  throw_invalid("another engine", vjp.which.front(), "symbol");
}

}  // namespace lmtfast::cpu
