// SPDX-License-Identifier: MIT
// Elements of tensors and the numbers they are computed in: a bfloat16 travels as its bits.
#pragma once

#include <cstdint>

#include "core/simd.h"

namespace lmtfast {

template <class Element>
struct RealOf {
  using type = Element;
};
template <>
struct RealOf<uint16_t> {
  using type = float;
};
// What values of Element are computed in.
template <class Element>
using Real = typename RealOf<Element>::type;

LMTFAST_INLINE float widen(float x) { return x; }
LMTFAST_INLINE double widen(double x) { return x; }
LMTFAST_INLINE float widen(uint16_t x) { return simd::widen_bfloat16(x); }

LMTFAST_INLINE void narrow(float x, float* y) { *y = x; }
LMTFAST_INLINE void narrow(double x, double* y) { *y = x; }
LMTFAST_INLINE void narrow(float x, uint16_t* y) { *y = simd::narrow_bfloat16(x); }

}  // namespace lmtfast
