// SPDX-License-Identifier: MIT
// Branch-free scalar functions that the compiler turns into SIMD inside `#pragma omp simd` loops.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(_MSC_VER)
#define LMTFAST_INLINE __forceinline
#else
#define LMTFAST_INLINE inline __attribute__((always_inline))
#endif

namespace lmtfast {

// Fused only where the target has the instruction: std::fma without one is a slow library call.
template <bool kFma, class T>
LMTFAST_INLINE T multiply_add(T a, T b, T c) {
  if constexpr (kFma) {
    return std::fma(a, b, c);
  } else {
    return a * b + c;
  }
}

// exp(x) for x <= 0. NaN gives NaN; results below the smallest normal number are flushed to 0.
// x = n ln2 + r, |r| <= ln2 / 2, exp(r) = 1 + r + r^2 p(r) with p interpolated at Chebyshev nodes.
// Adding 1.5 * 2^(mantissa) rounds x / ln2 to the nearest integer and leaves n in the low bits,
// ready to be shifted into the exponent. Largest error against long double, 1e7 points on the whole
// range: below 1.1 ulp for both types, with and without FMA (tests/csrc/test_vector_math.cpp).
template <bool kFma>
LMTFAST_INLINE float exp_nonpositive(float x) {
  constexpr float kRound = 12582912.0f;
  const float shifted = multiply_add<kFma>(x, 1.44269504f, kRound);
  const float n = shifted - kRound;
  // ln2 in two parts; the first has 13 bits, so n times it is exact.
  float r = multiply_add<kFma>(n, -0.693115234375f, x);
  r = multiply_add<kFma>(n, -3.194618494530941e-5f, r);
  float p = 1.98919813e-4f;
  p = multiply_add<kFma>(p, r, 1.39345419e-3f);
  p = multiply_add<kFma>(p, r, 8.33331002e-3f);
  p = multiply_add<kFma>(p, r, 4.16664568e-2f);
  p = multiply_add<kFma>(p, r, 1.66666667e-1f);
  p = multiply_add<kFma>(p, r, 5.00000001e-1f);
  p = multiply_add<kFma>(p * r, r, r) + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3F800000u);
  return x < -87.33f ? 0.0f : p * power;
}

template <bool kFma>
LMTFAST_INLINE double exp_nonpositive(double x) {
  constexpr double kRound = 6755399441055744.0;
  const double shifted = multiply_add<kFma>(x, 1.4426950408889634074, kRound);
  const double n = shifted - kRound;
  // ln2 in two parts; the first has 40 bits, so n times it is exact.
  double r = multiply_add<kFma>(n, -0.6931471805592082091208, x);
  r = multiply_add<kFma>(n, -7.3710025651677789818e-13, r);
  double p = 2.5101346928350340198e-8;
  p = multiply_add<kFma>(p, r, 2.7621338669142923800e-7);
  p = multiply_add<kFma>(p, r, 2.7557266418612303703e-6);
  p = multiply_add<kFma>(p, r, 2.4801518641395993583e-5);
  p = multiply_add<kFma>(p, r, 1.9841269864380513295e-4);
  p = multiply_add<kFma>(p, r, 1.3888888918939167785e-3);
  p = multiply_add<kFma>(p, r, 8.3333333333297934996e-3);
  p = multiply_add<kFma>(p, r, 4.1666666666620638584e-2);
  p = multiply_add<kFma>(p, r, 1.6666666666666667534e-1);
  p = multiply_add<kFma>(p, r, 5.0000000000000011280e-1);
  p = multiply_add<kFma>(p * r, r, r) + 1.0;
  const double power =
      std::bit_cast<double>((std::bit_cast<uint64_t>(shifted) << 52) + 0x3FF0000000000000u);
  return x < -708.3 ? 0.0 : p * power;
}

}  // namespace lmtfast
