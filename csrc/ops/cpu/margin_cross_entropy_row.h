// SPDX-License-Identifier: MIT
// Margin cross-entropy on the CPU, one row at a time. Definition: ops/margin_cross_entropy.h.
// Inlined into one function per instruction set, so: no lambdas, no calls that do not vectorise.
// Accumulates exponentials in T over blocks of 256, everything wider in double.
// Needs -ffp-contract=off: forward and backward must see the same A_j and the same arg-max.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "core/vector_math.h"
#include "ops/margin_cross_entropy.h"

namespace lmtfast::row {

// Hu et al. 2024: the smallest per-class ratio.
constexpr double kEmmaMinRatio = 0.01;
constexpr int32_t kSumBlock = 256;

template <class T>
struct Row {
  const T* z;
  const T* b;
  T c;
  int32_t t, k;
};

// Sample i; `widened` (k) holds its logits where they are stored in less than they are computed in.
template <class T>
LMTFAST_INLINE Row<Real<T>> row_of(const MarginCrossEntropy<T>& p, int64_t i, Real<T>* widened) {
  const T* logits = p.logits + i * p.logits_stride;
  const Real<T>* z = widened;
  if constexpr (std::is_same_v<T, Real<T>>) {
    z = logits;
  } else {
#pragma omp simd
    for (int64_t j = 0; j < p.k; ++j) widened[j] = widen(logits[j]);
  }
  return {z, p.rows + p.row_index[i] * p.rows_stride, p.coefficient[i],
          static_cast<int32_t>(p.target[i]), static_cast<int32_t>(p.k)};
}

// NaN never wins a comparison below. That hides nothing: every NaN still reaches the sum of
// exponentials.
template <class T>
LMTFAST_INLINE T row_max(const T* x, int32_t k) {
  T m = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : m)
  for (int32_t j = 0; j < k; ++j) m = x[j] > m ? x[j] : m;
  return m;
}

// LMT++: the one factor that keeps a correct prediction correct, and leaves a wrong one alone.
template <class T>
LMTFAST_INLINE T sample_factor(const Row<T>& row) {
  const T zt = row.z[row.t];
  T a = 1;
#pragma omp simd reduction(min : a)
  for (int32_t j = 0; j < row.k; ++j) {
    const T margin = zt - row.z[j];
    const T addition = j == row.t ? T(0) : row.c * row.b[j];
    T f = margin / addition;
    f = margin >= addition ? T(1) : f;
    f = margin <= T(0) ? T(0) : f;
    f = j == row.t ? T(1) : f;
    a = f < a ? f : a;
  }
  return a;
}

template <class T>
LMTFAST_INLINE T class_ratio(T margin, T addition) {
  T s = margin / addition;
  s = s < T(kEmmaMinRatio) ? T(kEmmaMinRatio) : s;
  s = s > T(1) ? T(1) : s;
  return addition == T(0) ? T(1) : s;
}

// y = exp(y - m) with 0 at `skip`; returns the sum.
template <bool kFma, class T>
LMTFAST_INLINE double exponentials(const T* x, T* y, int32_t k, int32_t skip, T m) {
  double total = 0;
  for (int32_t begin = 0; begin < k; begin += kSumBlock) {
    const int32_t end = k - begin < kSumBlock ? k : begin + kSumBlock;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int32_t j = begin; j < end; ++j) {
      const T e = exp_nonpositive<kFma>(x[j] - m);
      const T kept = j == skip ? T(0) : e;
      y[j] = kept;
      sum += kept;
    }
    total += static_cast<double>(sum);
  }
  return total;
}

template <class T>
LMTFAST_INLINE void multiply(T* y, int32_t k, T factor) {
#pragma omp simd
  for (int32_t j = 0; j < k; ++j) y[j] *= factor;
}

// Cross-entropy from the sum over the rivals and the target's own exponential; accurate when the
// loss is small.
template <class T>
LMTFAST_INLINE double loss_of(T m, T yt, double rivals, double own) {
  return (static_cast<double>(m) - static_cast<double>(yt)) + std::log1p(rivals + (own - 1.0));
}

template <bool kFma, class T>
LMTFAST_INLINE void forward_row(lmtfast_margin_member member, const Row<T>& row, T* loss, T* dz,
                                T* scale) {
  const T zt = row.z[row.t];
  T m = -std::numeric_limits<T>::infinity();
  T a = 1;
  if (member == LMTFAST_EMMA) {
#pragma omp simd reduction(max : m)
    for (int32_t j = 0; j < row.k; ++j) {
      const T addition = j == row.t ? T(0) : row.c * row.b[j];
      const T y = row.z[j] + class_ratio(zt - row.z[j], addition) * addition;
      dz[j] = y;
      m = y > m ? y : m;
    }
  } else {
    if (member == LMTFAST_LMTPP) a = sample_factor(row);
#pragma omp simd reduction(max : m)
    for (int32_t j = 0; j < row.k; ++j) {
      const T addition = j == row.t ? T(0) : row.c * row.b[j];
      const T y = row.z[j] + a * addition;
      dz[j] = y;
      m = y > m ? y : m;
    }
  }
  const double rivals = exponentials<kFma>(dz, dz, row.k, row.t, m);
  const double own = static_cast<double>(exp_nonpositive<kFma>(zt - m));
  const double inverse = 1.0 / (rivals + own);
  multiply(dz, row.k, static_cast<T>(inverse));
  // p_t - 1 would cancel.
  dz[row.t] = static_cast<T>(-rivals * inverse);
  *loss = static_cast<T>(loss_of(m, zt, rivals, own));
  *scale = a;
}

// GloRo's extra class: its logit and the class that attains it (-1: no rival).
template <class T>
struct Bottom {
  T logit;
  int32_t index;
};

template <class T>
LMTFAST_INLINE int32_t first_equal(const T* x, int32_t k, T value) {
  for (int32_t j = 0; j < k; ++j) {
    if (x[j] == value) return j;
  }
  return 0;
}

template <class T>
LMTFAST_INLINE Bottom<T> bottom_of(const Row<T>& row, T highest) {
  const int32_t r = first_equal(row.z, row.k, highest);
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  T logit = kLowest;
  T poisoned = 0;
#pragma omp simd reduction(max : logit, poisoned)
  for (int32_t j = 0; j < row.k; ++j) {
    T y = row.z[j] + row.c * row.b[j];
    y = j == r ? kLowest : y;
    logit = y > logit ? y : logit;
    poisoned = y != y ? T(1) : poisoned;
  }
  int32_t index = -1;
  for (int32_t j = 0; j < row.k && index < 0; ++j) {
    if (j != r && row.z[j] + row.c * row.b[j] == logit) index = j;
  }
  // A maximum skips NaN, and this one is all that the loss sees of the additions.
  return {poisoned > 0 ? std::numeric_limits<T>::quiet_NaN() : logit, index};
}

template <bool kFma, class T>
LMTFAST_INLINE void forward_row_gloro(const Row<T>& row, T* loss, T* dz, T* scale) {
  const T zt = row.z[row.t];
  const T highest = row_max(row.z, row.k);
  const Bottom<T> bottom = bottom_of(row, highest);
  const T m = bottom.logit > highest ? bottom.logit : highest;
  const double rivals = exponentials<kFma>(row.z, dz, row.k, row.t, m);
  const double own = static_cast<double>(exp_nonpositive<kFma>(zt - m));
  const double extra = static_cast<double>(exp_nonpositive<kFma>(bottom.logit - m));
  const double inverse = 1.0 / (rivals + extra + own);
  multiply(dz, row.k, static_cast<T>(inverse));
  dz[row.t] = static_cast<T>(-(bottom.index == row.t ? rivals : rivals + extra) * inverse);
  if (bottom.index >= 0 && bottom.index != row.t)
    dz[bottom.index] += static_cast<T>(extra * inverse);
  *loss = static_cast<T>(loss_of(m, zt, rivals + extra, own));
  *scale = static_cast<T>(extra * inverse);
}

// Adds row i's share to `gathered` (double, length k) and writes its two other gradients.
template <class T, class Z>
LMTFAST_INLINE T backward_row(lmtfast_margin_member member, const Row<T>& row, T g, T scale,
                              const T* dz, Z* gz, double* gathered) {
  double total = 0;
  const double gc = static_cast<double>(g) * static_cast<double>(row.c);
  if (member == LMTFAST_GLORO) {
    const Bottom<T> bottom = bottom_of(row, row_max(row.z, row.k));
    if (bottom.index >= 0) {
      gathered[bottom.index] += gc * static_cast<double>(scale);
      total = static_cast<double>(scale) * static_cast<double>(row.b[bottom.index]);
    }
  } else if (member == LMTFAST_EMMA) {
    const T zt = row.z[row.t];
#pragma omp simd reduction(+ : total)
    for (int32_t j = 0; j < row.k; ++j) {
      const T s = class_ratio(zt - row.z[j], row.c * row.b[j]);
      const double share = static_cast<double>(j == row.t ? T(0) : s * dz[j]);
      gathered[j] += gc * share;
      total += share * static_cast<double>(j == row.t ? T(0) : row.b[j]);
    }
  } else {
    const double factor = gc * static_cast<double>(scale);
#pragma omp simd reduction(+ : total)
    for (int32_t j = 0; j < row.k; ++j) {
      const double share = static_cast<double>(j == row.t ? T(0) : dz[j]);
      gathered[j] += factor * share;
      total += share * static_cast<double>(j == row.t ? T(0) : row.b[j]);
    }
    total *= static_cast<double>(scale);
  }
#pragma omp simd
  for (int32_t j = 0; j < row.k; ++j) narrow(g * dz[j], gz + j);
  return static_cast<T>(static_cast<double>(g) * total);
}

}  // namespace lmtfast::row
