// SPDX-License-Identifier: MIT
// Distances between the rows of a linear head and their gradient, on a CUDA device.
// Definition: lmtfast/backends/pair_norm.py. From differences for every number of classes, never
// from a Gram matrix: nothing cancels, and no tensor of (U, K, D) is formed.
//
// Work: 2 U K D flops forward (a subtraction and a fused multiply-add per term), twice that for the
// gradient, in FFMA; bytes at least the head, the norms and what is written, once each.
#pragma once

#include <cstdint>

#include "core/device_types.h"

namespace lmtfast::cuda {

template <class T>
struct PairNorm {
  const T* weight;         // (k, d), rows weight_stride apart
  const int64_t* classes;  // (u), in [0, k); null: u = k and every row, in order
  int64_t k, d, u, weight_stride;
};

// norms (u, k); exactly 0 where j is the row's own class, NaN in a row whose class is none. One
// launch.
template <class T>
void pair_norm_forward(const PairNorm<T>& problem, Compute<T>* norms, Stream stream);

// grad_weight (k, d) of <grad, norms>; a pair at distance 0 contributes 0. `own` is a workspace of
// (u, d). Two launches: what falls to the rows as first of a pair, then as second, with the first's
// share gathered in ascending order.
template <class T>
void pair_norm_vjp(const PairNorm<T>& problem, const Compute<T>* norms, const Compute<T>* grad,
                   Compute<T>* own, T* grad_weight, Stream stream);

}  // namespace lmtfast::cuda
