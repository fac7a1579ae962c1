// SPDX-License-Identifier: MIT
// The power iteration on a matrix, in column 0 of a panel: its products are bound by the bytes of
// the weights. Definition: lmtfast/engines/operator.py.
#pragma once

#include <bit>
#include <cmath>

#include "ops/cuda/pass.h"
#include "ops/cuda/view.h"

namespace lmtfast::cuda {

struct DenseStep {
  const View& v;
  const Op& op;
  const float* state;
  float *plain, *panel, *image, *back;
  const double* norms;

  __device__ DenseStep(const View& view, const Op& o) : v(view), op(o) {
    const OpWork& w = op.work;
    state = v.state + op.row.state_offset;
    plain = v.floats + w.plain;
    panel = v.floats + w.panel;
    image = v.floats + w.image;
    back = v.floats + w.back;
    norms = v.doubles + w.norms;
  }
  // ||y||, the same in every block that asks.
  __device__ double length() const {
    double square = 0;
    for (int64_t tile = 0; tile < op.work.pass.tiles; ++tile) square += norms[tile * kPassColumns];
    return std::sqrt(square);
  }
};

__device__ inline void prepare_matrix(const View& v, const Op& op) {
  const DenseStep y(v, op);
  const Stencil& s = op.s;
  double square = 0;
  for (int32_t c = threadIdx.x; c < s.channels; c += kBlockThreads) {
    square += static_cast<double>(y.state[c]) * static_cast<double>(y.state[c]);
  }
  const float inverse = inverse_or_one(std::sqrt(Team<true>::sum(square)));
  const int64_t pitch = vector_pitch(s.channels);
  for (int32_t c = threadIdx.x; c < s.channels; c += kBlockThreads) {
    y.plain[c] = y.state[c] * inverse;
    float* x = y.panel + 2 * vector_slot(c, pitch);
    x[0] = y.plain[c] * op.cs(c);
    x[1] = 0.0f;
  }
  if (threadIdx.x == 0) {
    // One tap, of phase 1, that begins at entry 0.
    float* e = y.panel + 8 * pitch;
    e[0] = 1.0f;
    e[1] = 0.0f;
    e[2] = std::bit_cast<float>(0);
  }
}

// The new iterate, saved as v, and sigma = ||A^T u||.
__device__ inline void finish_matrix(const View& v, const Op& op, int32_t index) {
  const DenseStep y(v, op);
  const Stencil& s = op.s;
  double square = 0;
  for (int32_t c = threadIdx.x; c < s.channels; c += kBlockThreads) {
    const double x = y.back[static_cast<int64_t>(c) * kPassColumns];
    square += x * x;
  }
  const double norm = std::sqrt(Team<true>::sum(square));
  const bool usable = norm > 0.0 && norm - norm == 0.0;
  const float inverse = inverse_or_one(norm);
  for (int32_t c = threadIdx.x; c < s.channels; c += kBlockThreads) {
    const float next =
        usable ? y.back[static_cast<int64_t>(c) * kPassColumns] * inverse : y.plain[c];
    v.new_state[op.row.state_offset + c] = next;
    v.saved[op.row.saved_offset + s.rows + c] = next;
  }
  if (threadIdx.x == 0) v.sigmas[index] = static_cast<float>(norm);
}

// Saved u; where nothing moves, saved v and sigma = ||A v|| as well.
__device__ inline void record_matrix(const View& v, int32_t index) {
  const Op op(v, index, 0);
  const DenseStep y(v, op);
  const Stencil& s = op.s;
  const double norm = y.length();
  float* u = v.saved + op.row.saved_offset;
  const float inverse = inverse_or_one(norm);
  for (int32_t o = threadIdx.x; o < s.rows; o += kBlockThreads) {
    u[o] = y.image[static_cast<int64_t>(o) * kPassColumns] * inverse;
  }
  if (v.new_state != nullptr) return;
  for (int32_t c = threadIdx.x; c < s.channels; c += kBlockThreads) u[s.rows + c] = y.plain[c];
  if (threadIdx.x == 0) v.sigmas[index] = static_cast<float>(norm);
}

}  // namespace lmtfast::cuda
