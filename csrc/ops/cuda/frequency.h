// SPDX-License-Identifier: MIT
// Frequencies of a symbol (lmtfast/engines/frequency.py): the grid, and a Newton step on
//   f(w) = |sum over taps of q_t exp(-i w . offset_t)|^2
// in double, by one warp per candidate.
#pragma once

#include <cmath>

#include "ops/cuda/stencil.h"

namespace lmtfast::cuda {

constexpr double kTwoPi = 6.283185307179586;
// Grid points per axis and degree: neighbours closer than a sixth of the finest oscillation.
constexpr int32_t kGridDensity = 4;
// Points of one grid; beyond it the grid coarsens and Newton steps do the rest.
constexpr int32_t kMaxPoints = 4096;

struct Grid {
  int32_t size[kAxes];
  LMTFAST_HD int32_t points() const { return size[0] * size[1] * size[2]; }
};

// Unused axes have one point. Runs on the host, once per plan.
inline Grid grid_of(const Stencil& s) {
  Grid grid;
  int64_t points = 1;
  for (int a = 0; a < kAxes; ++a) {
    const int32_t degree = symbol_degree(s, a);
    grid.size[a] = degree > 0 ? kGridDensity * (degree + 1) : 1;
    points *= grid.size[a];
  }
  while (points > kMaxPoints) {
    int largest = kAxes - s.axes;
    for (int a = largest; a < kAxes; ++a) largest = grid.size[a] > grid.size[largest] ? a : largest;
    if (grid.size[largest] <= 8) break;
    points /= grid.size[largest];
    grid.size[largest] = (grid.size[largest] + 1) / 2;
    points *= grid.size[largest];
  }
  return grid;
}

LMTFAST_HD double grid_frequency(const Grid& grid, const Point& point, int axis) {
  return point.at[axis] * (kTwoPi / grid.size[axis]);
}

// w . offset in turns, for a grid point: whole turns are left out before anything is rounded.
LMTFAST_HD float grid_turns(const Stencil& s, const Grid& grid, const Point& point,
                            const Point& tap) {
  float turns = 0.0f;
  LMTFAST_UNROLL
  for (int a = 0; a < kAxes; ++a) {
    const int32_t steps = point.at[a] * symbol_offset(s, a, tap.at[a]) % grid.size[a];
    turns += static_cast<float>(steps) / static_cast<float>(grid.size[a]);
  }
  return turns;
}

LMTFAST_HD double angle_of(const Stencil& s, const double* w, const Point& tap) {
  double angle = 0.0;
  LMTFAST_UNROLL
  for (int a = 0; a < kAxes; ++a) angle += w[a] * symbol_offset(s, a, tap.at[a]);
  return angle;
}

// f, its gradient and Hessian from g, g_a = sum of tau_a q e, g_ab = sum of tau_a tau_b q e.
struct Moments {
  double g[2], first[kAxes][2], second[kAxes][kAxes][2];
};

LMTFAST_HD void add_term(const Stencil& s, const double* w, const Point& tap, double re, double im,
                         Moments& m) {
  double n, c;
  sine_cosine(angle_of(s, w, tap), n, c);
  const double term[2] = {re * c + im * n, im * c - re * n};  // q exp(-i angle)
  double tau[kAxes];
  LMTFAST_UNROLL
  for (int a = 0; a < kAxes; ++a) tau[a] = symbol_offset(s, a, tap.at[a]);
  LMTFAST_UNROLL
  for (int part = 0; part < 2; ++part) {
    m.g[part] += term[part];
    LMTFAST_UNROLL
    for (int a = 0; a < kAxes; ++a) {
      m.first[a][part] += tau[a] * term[part];
      LMTFAST_UNROLL
      for (int b = 0; b < kAxes; ++b) m.second[a][b][part] += tau[a] * tau[b] * term[part];
    }
  }
}

LMTFAST_HD double value_of(const Moments& m) { return m.g[0] * m.g[0] + m.g[1] * m.g[1]; }

// A Newton step from w towards a maximum of f, damped where f is not yet concave around w; not
// finite where the damped Hessian is singular. With g = sum of q e, dg/dw_a = -i g_a and
// d2g/dw_a dw_b = -g_ab. Loops have fixed bounds, so that a device keeps the matrix in registers:
// an unused axis moves nothing.
LMTFAST_HD void newton_step(const Stencil& s, const Moments& m, const double* w, double* trial) {
  const int unused = kAxes - s.axes;
  double gradient[kAxes], matrix[kAxes][kAxes];
  LMTFAST_UNROLL
  for (int a = 0; a < kAxes; ++a) {
    // 2 Re(conj(g) (-i g_a)) = 2 (g_re g_a,im - g_im g_a,re)
    gradient[a] = 2.0 * (m.g[0] * m.first[a][1] - m.g[1] * m.first[a][0]);
    LMTFAST_UNROLL
    for (int b = 0; b < kAxes; ++b) {
      const double outer = m.first[a][0] * m.first[b][0] + m.first[a][1] * m.first[b][1];
      const double bend = m.g[0] * m.second[a][b][0] + m.g[1] * m.second[a][b][1];
      matrix[a][b] = 2.0 * (outer - bend);
    }
  }
  // Gershgorin: without damping the Hessian is negative definite where `edge` is negative.
  double edge = -INFINITY, largest = 0.0;
  LMTFAST_UNROLL
  for (int a = 0; a < kAxes; ++a) {
    double radius = 0.0;
    LMTFAST_UNROLL
    for (int b = 0; b < kAxes; ++b) radius += b == a ? 0.0 : std::fabs(matrix[a][b]);
    if (a < unused) continue;
    edge = std::fmax(edge, matrix[a][a] + radius);
    largest = std::fmax(largest, std::fabs(matrix[a][a]));
  }
  const double damping = edge < 0.0 ? 0.0 : edge + 1e-3 * largest;
  LMTFAST_UNROLL
  for (int a = 0; a < kAxes; ++a) matrix[a][a] -= a < unused ? 1.0 : damping;
  // Elimination; the matrix is negative definite, so its pivots need no exchange.
  LMTFAST_UNROLL
  for (int a = 0; a < kAxes; ++a) {
    LMTFAST_UNROLL
    for (int r = a + 1; r < kAxes; ++r) {
      const double factor = matrix[r][a] / matrix[a][a];
      LMTFAST_UNROLL
      for (int c = a + 1; c < kAxes; ++c) matrix[r][c] -= factor * matrix[a][c];
      gradient[r] -= factor * gradient[a];
    }
  }
  LMTFAST_UNROLL
  for (int a = kAxes - 1; a >= 0; --a) {
    double x = gradient[a];
    LMTFAST_UNROLL
    for (int c = a + 1; c < kAxes; ++c) x -= matrix[a][c] * gradient[c];
    gradient[a] = x / matrix[a][a];
    trial[a] = w[a] - gradient[a];
  }
}

// Into [-pi, pi): small angles keep their digits.
LMTFAST_HD double wrapped(double angle) {
  return angle - kTwoPi * std::floor((angle + kTwoPi / 2) / kTwoPi);
}

}  // namespace lmtfast::cuda
