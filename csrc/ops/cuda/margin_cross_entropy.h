// SPDX-License-Identifier: MIT
// Margin cross-entropy on a CUDA device. Formulas: ops/margin_cross_entropy.h. All pointers are
// device pointers; a call only enqueues work. C is double for double logits, else float.
//
// The host cannot see targets and row indices. One out of range makes its sample's loss and
// gradients NaN, adds nothing to grad_rows, and is never used as an address.
#pragma once

#include <cstdint>

#include "core/device_types.h"
#include "lmtfast/lmtfast.h"

namespace lmtfast::cuda {

template <class T>
struct MarginProblem {
  using C = Compute<T>;
  const T* logits;
  const int64_t* target;
  const int64_t* row_index;
  const C* rows;
  const C* coefficient;
  int64_t n, k, u, logits_stride, rows_stride;
  lmtfast_margin_member member;
};

// Entries of the backward's int32 workspace: samples in the order of their rows (n), where each
// row's samples begin (u + 1), and the class that attains GloRo's extra logit (n).
constexpr int64_t margin_workspace(int64_t n, int64_t u) { return 2 * n + u + 1; }

// One launch. Bytes at least: the logits and the pair-norm rows once in, dlogits once out.
template <class T>
void margin_forward(const MarginProblem<T>& problem, Compute<T>* loss, Compute<T>* dlogits,
                    Compute<T>* scale, Stream stream);

// Two launches, no float atomics: sample by sample, then row of the table by row. Bytes at least:
// dlogits in twice, grad_logits and grad_rows out. grad_logits may be dlogits itself only where T
// is C and the second launch has nothing to read, so it must not be.
template <class T>
void margin_backward(const MarginProblem<T>& problem, const Compute<T>* grad_loss,
                     const Compute<T>* dlogits, const Compute<T>* scale, T* grad_logits,
                     Compute<T>* grad_rows, Compute<T>* grad_coefficient, int32_t* workspace,
                     Stream stream);

}  // namespace lmtfast::cuda
