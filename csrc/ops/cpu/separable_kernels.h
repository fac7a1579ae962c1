// SPDX-License-Identifier: MIT
// Inner loops of the separable engine, one set per instruction set.
//
// Low-rank vectors lie as rows of `lanes` floats, 1, 4 or 8: the rank and zeros behind it. What has
// an entry per tap and pattern lies as rows of `width` floats, taps * lanes and zeros behind them,
// a multiple of kWidthStep.
#pragma once

#include <cstdint>

#include "core/dispatch.h"

namespace lmtfast::cpu {

constexpr int64_t kLanes = 8;
constexpr int64_t kWidthStep = 16;

inline int64_t lanes_of(int64_t rank) { return rank == 1 ? 1 : rank <= 4 ? 4 : kLanes; }
inline int64_t width_of(int64_t taps, int64_t lanes) {
  return (taps * lanes + kWidthStep - 1) / kWidthStep * kWidthStep;
}

// Rows of (channels, taps), or of (taps, channels) where the taps are outside.
template <class T>
struct KernelRows {
  T* data;
  int64_t rows, channels, taps;
  bool tap_major;

  int64_t size() const { return channels * taps; }
  KernelRows from(int64_t row, int64_t count) const {
    return {data + row * size(), count, channels, taps, tap_major};
  }
};

struct SeparableKernels {
  // y[row][tap] = sum over channels of w[row][channel][tap] a[channel]; y has rows of `width`.
  void (*apply)(const KernelRows<const float>& w, int64_t lanes, const float* a, float* y,
                int64_t width);
  // b[channel] += sum over rows and taps of w[row][channel][tap] m[row][tap]
  void (*pull)(const KernelRows<const float>& w, int64_t lanes, const float* m, int64_t width,
               float* b);
  // g[row][channel][tap] = or += <m[row][tap], a[channel]>
  void (*outer)(const KernelRows<float>& g, int64_t lanes, const float* m, int64_t width,
                const float* a, bool add);
  // z (rows, width) = x (rows, width) b, b (depth, width) with depth <= width
  void (*multiply)(int64_t rows, int64_t depth, int64_t width, const float* x, const float* b,
                   float* z);
  // g (depth, width) += x^T x over the rows of x (rows, width), on and right of the diagonal; what
  // lies left of it is garbage.
  void (*square)(int64_t rows, int64_t depth, int64_t width, const float* x, float* g);
  // <x, z>: in floats over up to a few thousand entries per lane
  double (*dot)(int64_t size, const float* x, const float* z);
  // Householder QR of x (rows, lanes), whose first `rank` columns count, rows >= rank: x becomes Q
  // as LAPACK's geqrf and orgqr have it, triangle (lanes, lanes) R and zeros.
  void (*orthonormalise)(int64_t rows, int64_t rank, int64_t lanes, double* x, double* triangle);
  // x = x triangle^T, (rows, lanes); a triangle has one row per lane
  void (*turn)(int64_t rows, int64_t lanes, const double* triangle, double* x);
  // x = factor x, rounded once
  void (*rescale)(int64_t size, double factor, float* x);
  // The largest |x|, NaN if an x is not finite.
  float (*largest)(int64_t size, const float* x);
  // to (lanes) = sum of `count` terms
  void (*add)(int64_t count, const float* const* terms, int64_t lanes, float* to);
  // to = the floats of bfloat16 numbers
  void (*widen)(int64_t size, const uint16_t* from, float* to);
};

const SeparableKernels& separable_kernels(Isa isa);

}  // namespace lmtfast::cpu
