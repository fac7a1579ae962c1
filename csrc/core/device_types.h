// SPDX-License-Identifier: MIT
// Types of the CUDA interface that need no CUDA header.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LMTFAST_HD __host__ __device__ inline
#else
#define LMTFAST_HD inline
#endif

// On a device: before a loop whose arrays must stay in registers, and before one whose body is large
// enough as it is.
#if defined(__CUDA_ARCH__)
#define LMTFAST_UNROLL _Pragma("unroll")
#define LMTFAST_ROLL _Pragma("unroll 1")
#else
#define LMTFAST_UNROLL
#define LMTFAST_ROLL
#endif

namespace lmtfast::cuda {

// A cudaStream_t; null is the default stream.
using Stream = void*;

// A 16-bit float with the exponent of a float32. Conversion rounds to the nearest even.
struct bfloat16 {
  uint16_t bits;
};

LMTFAST_HD float widen(float x) { return x; }
LMTFAST_HD double widen(double x) { return x; }
LMTFAST_HD float widen(bfloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

LMTFAST_HD void narrow(float x, float& y) { y = x; }
LMTFAST_HD void narrow(double x, double& y) { y = x; }
LMTFAST_HD void narrow(float x, bfloat16& y) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  // A NaN whose mantissa is cut off must not become an infinity.
  const uint32_t rounded = x != x ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1u);
  y.bits = static_cast<uint16_t>(rounded >> 16);
}

// The type that values of T are computed in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// Sine and cosine. In half turns a device needs no reduction of large arguments, and no stack.
LMTFAST_HD void sine_cosine(double angle, double& sine, double& cosine) {
#if defined(__CUDA_ARCH__)
  sincospi(angle * 0.3183098861837907, &sine, &cosine);
#else
  sine = std::sin(angle);
  cosine = std::cos(angle);
#endif
}
// The same for an angle in turns.
LMTFAST_HD void sine_cosine_of_turns(float turns, float& sine, float& cosine) {
#if defined(__CUDA_ARCH__)
  sincospif(2.0f * turns, &sine, &cosine);
#else
  sine = std::sin(6.2831853f * turns);
  cosine = std::cos(6.2831853f * turns);
#endif
}

}  // namespace lmtfast::cuda
