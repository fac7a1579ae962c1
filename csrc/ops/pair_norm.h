// SPDX-License-Identifier: MIT
// Distances between the rows of a linear head, and their gradient to the head, on the CPU.
// Definition: lmtfast/backends/pair_norm.py.
//
//   norms[u, j] = ||w_c(u) - w_j||, exactly 0 where j = c(u)
//   grad_weight = gradient of <grad, norms>: with A = grad / norms, 0 at distance 0, row u sends
//     sum_j A_uj (w_u - w_j) to class c(u) and A_uj (w_j - w_u) to each class j
//
// Up to kExactClasses classes everything is formed from differences. Beyond, from products in float
// of rows minus another row (which shifts nothing: every term is a difference): row 0, or for the
// gradient the mean. What belongs to a distance below an eighth of its rows' length is formed from
// differences, so that no distance has a relative error above about 1e-5, however close its rows
// are, and no gradient loses more than that to them. Integers whose squares sum to less than 2^24 give the squared distance without rounding.
//
// Cost: 2 U K D flops forward and 4 U K D for the gradient; half of either where every row is
// wanted. Memory: the head or the table once more, packed; never (U, K, D).
#pragma once

#include "core/dispatch.h"

namespace lmtfast {

constexpr int64_t kExactClasses = 32;

// W is float, or uint16_t for bfloat16.
template <class W>
struct PairNorm {
  const W* weight;         // (k, d), rows weight_stride apart
  const int64_t* classes;  // (u), in [0, k); null: u = k and every row, in order
  int64_t k, d, u, weight_stride, num_threads;
};

// Throws InvalidArgument unless sizes, strides, pointers and classes are usable.
template <class W>
void validate(const PairNorm<W>& problem);

namespace cpu {

template <class W>
void pair_norm_forward(const PairNorm<W>& problem, float* norms, Isa isa = best_isa());

template <class W>
void pair_norm_vjp(const PairNorm<W>& problem, const float* norms, const float* grad,
                   W* grad_weight, Isa isa = best_isa());

}  // namespace cpu
}  // namespace lmtfast
