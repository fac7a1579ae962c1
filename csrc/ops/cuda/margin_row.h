// SPDX-License-Identifier: MIT
// One row of the margin cross-entropy, shared by a team of threads. Thread r of a team of s owns the
// classes r, r + s, ... in every pass, so what it keeps for later passes needs no barrier.
// Needs contraction off: forward and backward must see the same additions and the same arg-max.
#pragma once

#include <cmath>
#include <limits>

#include "ops/cuda/margin_cross_entropy.h"
#include "ops/cuda/team.h"

namespace lmtfast::cuda {

// Hu et al. 2024: the smallest per-class ratio.
constexpr double kEmmaMinRatio = 0.01;

template <class C>
LMTFAST_HD C infinity() {
  return std::numeric_limits<C>::infinity();
}

template <class C>
LMTFAST_HD C not_a_number() {
  return std::numeric_limits<C>::quiet_NaN();
}

// LMT++: the share of the addition that ties this rival; 0 where it already ties or leads.
template <class C>
LMTFAST_HD C tie_factor(C margin, C addition) {
  if (margin <= C(0)) return C(0);
  return margin >= addition ? C(1) : margin / addition;
}

// EMMA: the same, clipped from below; 1 where there is nothing to add.
template <class C>
LMTFAST_HD C class_ratio(C margin, C addition) {
  if (addition == C(0)) return C(1);
  C s = margin / addition;
  s = s < C(kEmmaMinRatio) ? C(kEmmaMinRatio) : s;
  return s > C(1) ? C(1) : s;
}

// Logits z_j and additions c b_j of one row: read from global memory, or kept in shared memory.
template <class T, bool kKept>
struct RowSource {
  using C = Compute<T>;
  const T* z;
  const C* b;
  C c;
  C* kept_z;
  C* kept_a;

  __device__ void keep(uint32_t j) const {
    kept_z[j] = widen(z[j]);
    kept_a[j] = c * b[j];
  }
  __device__ C logit(uint32_t j) const { return kKept ? kept_z[j] : widen(z[j]); }
  __device__ C addition(uint32_t j) const { return kKept ? kept_a[j] : c * b[j]; }
};

// GloRo's extra class: its logit and the class that attains it (-1: no rival).
template <class C>
struct Bottom {
  C logit;
  C highest;
  int32_t index;
};

template <class Crew, class Source>
__device__ auto bottom_of(const Source& row, uint32_t k) -> Bottom<typename Source::C> {
  using C = typename Source::C;
  const uint32_t first = static_cast<uint32_t>(Crew::rank());
  const uint32_t step = static_cast<uint32_t>(Crew::size());
  C highest = -infinity<C>();
  for (uint32_t j = first; j < k; j += step) {
    const C z = row.logit(j);
    highest = z > highest ? z : highest;
  }
  highest = Crew::max(highest);
  uint32_t r = k;
  for (uint32_t j = first; j < k && r == k; j += step) {
    if (row.logit(j) == highest) r = j;
  }
  r = Crew::min(r);
  r = r == k ? 0 : r;  // a row of NaN
  C logit = -infinity<C>();
  C poisoned = 0;
  for (uint32_t j = first; j < k; j += step) {
    if (j == r) continue;
    const C y = row.logit(j) + row.addition(j);
    logit = y > logit ? y : logit;
    poisoned = y != y ? C(1) : poisoned;
  }
  logit = Crew::max(logit);
  poisoned = Crew::max(poisoned);
  uint32_t index = k;
  for (uint32_t j = first; j < k && index == k; j += step) {
    if (j != r && row.logit(j) + row.addition(j) == logit) index = j;
  }
  index = Crew::min(index);
  // A maximum skips NaN, and this one is all that the loss sees of the additions.
  return {poisoned > C(0) ? not_a_number<C>() : logit, highest,
          index == k ? -1 : static_cast<int32_t>(index)};
}

// Cross-entropy from the sum over the rivals and the target's own exponential; accurate when the
// loss is small.
template <class C>
__device__ C loss_of(C m, C yt, double rivals, double own) {
  return static_cast<C>((static_cast<double>(m) - static_cast<double>(yt)) +
                        std::log1p(rivals + (own - 1.0)));
}

template <class C>
struct RowResult {
  C *loss, *dz, *scale;
};

// Writes dz = exp(y - m) / (rivals + extra + own), p_t - 1 without cancellation, and returns 1 /
// the sum. `y(j)` is asked twice per class.
template <class Crew, class C, class Logits>
__device__ double softmax(uint32_t k, uint32_t t, C m, C yt, double extra, bool extra_is_target,
                          Logits y, const RowResult<C>& out) {
  const uint32_t first = static_cast<uint32_t>(Crew::rank());
  const uint32_t step = static_cast<uint32_t>(Crew::size());
  double rivals = 0;
  for (uint32_t j = first; j < k; j += step) {
    const double e = static_cast<double>(std::exp(y(j) - m));
    rivals += j == t ? 0.0 : e;
  }
  rivals = Crew::sum(rivals);
  const double own = static_cast<double>(std::exp(yt - m));
  const double inverse = 1.0 / (rivals + extra + own);
  const C factor = static_cast<C>(inverse);
  for (uint32_t j = first; j < k; j += step) {
    if (j != t) out.dz[j] = std::exp(y(j) - m) * factor;
  }
  if (t % step == first) {
    out.dz[t] = static_cast<C>(-(extra_is_target ? rivals : rivals + extra) * inverse);
  }
  if (first == 0) *out.loss = loss_of(m, yt, rivals + extra, own);
  return inverse;
}

template <class Crew, class Source, class C>
__device__ void forward_shift(lmtfast_margin_member member, const Source& row, uint32_t k,
                              uint32_t t, const RowResult<C>& out) {
  const uint32_t first = static_cast<uint32_t>(Crew::rank());
  const uint32_t step = static_cast<uint32_t>(Crew::size());
  const C zt = widen(row.z[t]);
  C a = 1;
  if (member == LMTFAST_LMTPP) {
    for (uint32_t j = first; j < k; j += step) {
      if (j == t) continue;
      const C f = tie_factor(zt - row.logit(j), row.addition(j));
      a = f < a ? f : a;
    }
    a = Crew::min(a);
  }
  const auto shifted = [&](uint32_t j) {
    const C z = row.logit(j);
    if (j == t) return z;
    const C addition = row.addition(j);
    return z + (member == LMTFAST_EMMA ? class_ratio(zt - z, addition) : a) * addition;
  };
  C m = -infinity<C>();
  for (uint32_t j = first; j < k; j += step) {
    const C y = shifted(j);
    m = y > m ? y : m;
  }
  m = Crew::max(m);
  softmax<Crew>(k, t, m, zt, 0.0, false, shifted, out);
  if (first == 0) *out.scale = a;
}

template <class Crew, class Source, class C>
__device__ void forward_gloro(const Source& row, uint32_t k, uint32_t t, const RowResult<C>& out) {
  const Bottom<C> bottom = bottom_of<Crew>(row, k);
  const C m = bottom.logit > bottom.highest ? bottom.logit : bottom.highest;
  const double extra = static_cast<double>(std::exp(bottom.logit - m));
  const bool at_target = bottom.index == static_cast<int32_t>(t);
  const auto plain = [&](uint32_t j) { return row.logit(j); };
  const double inverse = softmax<Crew>(k, t, m, C(widen(row.z[t])), extra, at_target, plain, out);
  // The class that attains it has the extra probability as well; its owner has just written it.
  if (bottom.index >= 0 && !at_target && bottom.index % Crew::size() == Crew::rank()) {
    out.dz[bottom.index] += static_cast<C>(extra * inverse);
  }
  if (Crew::rank() == 0) *out.scale = static_cast<C>(extra * inverse);
}

}  // namespace lmtfast::cuda
