// SPDX-License-Identifier: MIT
// One step of every operator of a network, and its gradient: layouts shared by all devices.
//
// The reference is lmtfast/engines/{operator,symbol,separable}.py; a device must reproduce what it
// does to sigma, iterates and saved vectors up to rounding. G groups, R rows and C channels per
// group, T taps, P = product of strides, F = LMTFAST_CANDIDATES, r = row.rank, n and m input and
// output positions, d axes. Complex numbers are (re, im) pairs; all arrays are row-major.
//
// Iterates, from row.state_offset
//   operator   v: the operator's input, (G C, n); for a transposed convolution (G R, m)
//   symbol     G x [F x (circle (d, 2): cos and sin of w, up to a positive scale;
//                        x (P C, 2), up to a positive scale)
//                   anchor (d, 2)]
//   separable  G x [h (n, r), a (C, r)]
// Saved for the gradient, from row.saved_offset
//   operator   u (the operator's output), v (its input)
//   symbol     group (1), u (R, 2), z (C, T, 2), p (R, 2) of the winning candidate:
//              y = diag(rs) p + identity * (centre tap of z) = sigma u, p = W diag(cs) z
//   separable  group (1), ||A v|| over the scale of y (1), h (n, r), a (C, r), y (R, T, r)
// Gradient of sigma in the acting kernel, (R, C, T) of the saved group
//   operator   sum over positions of u v, as any convolution's weight gradient; all groups
//   symbol     Re(conj(u) z) = u_re z_re + u_im z_im
//   separable  sum_k V_tk a_k, V the image seen through the shifted patterns
// and, with dA that gradient, dW = rs cs dA, d rs = sum over (C, T) of W cs dA, d cs likewise.
#pragma once

#include <vector>

#include "core/status.h"

namespace lmtfast {

// Product over the three axes; unused ones hold 1.
inline int64_t volume(const int64_t* extent) { return extent[0] * extent[1] * extent[2]; }

inline int64_t taps(const lmtfast_op_row& row) { return volume(row.kernel); }
inline int64_t phases(const lmtfast_op_row& row) { return volume(row.stride); }
inline int64_t columns(const lmtfast_op_row& row) { return row.channels * taps(row); }

// The tap that the identity of a row acts at; inside the kernel wherever a row has an identity.
int64_t centre_tap(const lmtfast_op_row& row);

// Entries of a row's iterate and of what it saves; lmtfast/table.py holds the same formulas.
int64_t state_entries(const lmtfast_op_row& row);
int64_t saved_entries(const lmtfast_op_row& row);

// Throws InvalidArgument unless offsets, slots, sizes and dtypes are consistent and in range.
void validate(const lmtfast_network& network, const lmtfast_tensor* tensors, int64_t n_tensors);
void validate_tape(const lmtfast_network& network);

namespace cpu {

// A step of the operators `which` (indices into network.rows), all of one engine.
struct SpectralStep {
  const lmtfast_network& network;
  const lmtfast_tensor* tensors;
  const float* state;
  float* new_state;  // null: read sigma, move nothing
  float* sigmas;
  float* saved;  // the scale buffer at its start is ready
  int64_t threads;
  std::vector<int64_t> which;
};

// Gradients of the operators `which`, in the order of the table.
struct SpectralVjp {
  const lmtfast_network& network;
  const lmtfast_tensor* tensors;
  const float* saved;
  const float* grad_sigmas;
  const lmtfast_tensor* grads;
  // Whether an earlier operator has written the gradient of this one's weight: then add to it.
  const std::vector<char>& accumulate;
  // Gradient in the scale buffer, zero at the start; null where no scale's gradient is wanted.
  double* grad_scales;
  int64_t threads;
  std::vector<int64_t> which;
};

// Writes the scale buffer.
void fill_scales(const lmtfast_network& network, const lmtfast_tensor* tensors, float* scales);

void operator_step(const SpectralStep& step);
void symbol_step(const SpectralStep& step);
void separable_step(const SpectralStep& step);

void operator_vjp(const SpectralVjp& vjp);
void symbol_vjp(const SpectralVjp& vjp);
void separable_vjp(const SpectralVjp& vjp);

void spectral_step(const lmtfast_network& network, const lmtfast_tensor* tensors,
                   const float* state, float* new_state, float* sigmas, float* saved,
                   int64_t threads);
void spectral_vjp(const lmtfast_network& network, const lmtfast_tensor* tensors, const float* saved,
                  const float* grad_sigmas, const lmtfast_tensor* grads, int64_t n_tensors,
                  int64_t threads);
void compose(const lmtfast_network& network, const float* sigmas, float* values, float* jacobian);

// One operator of the table by itself; vectors as the operator engine has them.
void matvec(const lmtfast_network& network, int64_t row, const lmtfast_tensor* tensors,
            const float* v, float* u, int64_t threads);
void rmatvec(const lmtfast_network& network, int64_t row, const lmtfast_tensor* tensors,
             const float* u, float* v, int64_t threads);
void weight_vjp(const lmtfast_network& network, int64_t row, const lmtfast_tensor* tensors,
                int64_t n_tensors, const float* u, const float* v, const lmtfast_tensor* grads,
                int64_t threads);

}  // namespace cpu
}  // namespace lmtfast
