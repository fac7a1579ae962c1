// SPDX-License-Identifier: MIT
// Margin cross-entropy: declaration shared by devices.
//
// z is a row of logits, t its target, r its reference class, m_j = z_t - z_j,
// A_j = c * rows[row_index][j], and A_r = 0 whatever the table holds there.
//
//   LMT     r = t       y_j = z_j + A_j
//   LMT++   r = t       y_j = z_j + a A_j,    a = min over j != t of f_j:
//                       f_j = 0 if m_j <= 0, 1 if m_j >= A_j, else m_j / A_j
//   EMMA    r = t       y_j = z_j + s_j A_j,  s_j = clip(m_j / A_j, 0.01, 1), 1 where A_j = 0
//   GloRo   r = argmax z (lowest index), and one more class:
//                       y_bottom = max over j != r of (z_j + A_j), -inf where K = 1
//
// loss = logsumexp(y) - y_t; a and s are constants of the gradient.
// Sources: Tsuzuku et al. 2018 (LMT, LMT++, its published code); Hu et al. 2024 (EMMA);
// Leino et al. 2021 (GloRo).
//
// Saved for the backward pass, so that it is one sweep over dlogits and rows:
//   dlogits (N, K)  softmax(y) - onehot; GloRo adds p_bottom at the class that attains y_bottom
//   scale   (N)     LMT 1, LMT++ a, EMMA 1 (s_j is computed again), GloRo p_bottom
// Backward, with g = grad_loss:
//   grad_logits = g dlogits
//   grad_rows[u] = sum of g c s_j dlogits_j over samples with row_index = u, ascending; j != r
//   grad_coefficient = g sum over j != r of s_j rows_j dlogits_j
//   GloRo: only the attaining class counts in the last two, with p_bottom in place of s_j dlogits_j
#pragma once

#include "core/dispatch.h"
#include "core/element.h"

namespace lmtfast {

// T is the type of the logits and of their gradient: float, double, or uint16_t for bfloat16. All
// else is Real<T>.
template <class T>
struct MarginCrossEntropy {
  const T* logits;
  const int64_t* target;
  const int64_t* row_index;
  const Real<T>* rows;
  const Real<T>* coefficient;
  int64_t n, k, u, logits_stride, rows_stride, num_threads;
  lmtfast_margin_member member;
};

// Throws InvalidArgument unless sizes, strides, pointers and indices are usable.
template <class T>
void validate(const MarginCrossEntropy<T>& problem);

namespace cpu {

template <class T>
void margin_cross_entropy_forward(const MarginCrossEntropy<T>& problem, Real<T>* loss,
                                  Real<T>* dlogits, Real<T>* scale, Isa isa = best_isa());

template <class T>
void margin_cross_entropy_backward(const MarginCrossEntropy<T>& problem, const Real<T>* grad_loss,
                                   const Real<T>* dlogits, const Real<T>* scale, T* grad_logits,
                                   Real<T>* grad_rows, Real<T>* grad_coefficient,
                                   Isa isa = best_isa());

}  // namespace cpu
}  // namespace lmtfast
