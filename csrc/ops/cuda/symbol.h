// SPDX-License-Identifier: MIT
// The symbol engine's step around its two products (lmtfast/engines/symbol.py), one block per group:
// what the weights multiply before, the search for frequencies and the next vectors after.
// Candidate f of F has the panel columns 2 f and 2 f + 1, real and imaginary part.
#pragma once

#include <bit>

#include "ops/cuda/frequency.h"
#include "ops/cuda/pass.h"
#include "ops/cuda/view.h"

namespace lmtfast::cuda {

constexpr int kCandidates = LMTFAST_CANDIDATES;
// The explorer has settled when one power step gains less than this fraction.
constexpr double kStalled = 1e-3;

struct Symbol {
  const View& v;
  const Op& op;
  int32_t width;           // phases channels: complex entries of x
  int64_t candidate_size;  // floats of a candidate in the state
  const float* state;      // of the group
  float *plain, *panel, *phase, *image, *back, *fresh;
  double *frequency, *response, *norms;

  __device__ Symbol(const View& view, const Op& o) : v(view), op(o) {
    const OpWork& w = op.work;
    const int64_t g = op.group, taps = op.s.taps;
    width = op.s.phases * op.s.channels;
    candidate_size = 2 * (op.s.axes + width);
    state = v.state + state_offset();
    plain = v.floats + w.plain + g * kCandidates * width * 2;
    panel = v.floats + w.panel + g * w.pass.subsets * w.pass.vector;
    phase = v.floats + w.phase + g * taps * kPassColumns;
    image = v.floats + w.image + g * op.s.rows * kPassColumns;
    back = v.floats + w.back + g * op.s.columns * kPassColumns;
    fresh = v.floats + w.fresh + g * kCandidates * width * 2;
    frequency = v.doubles + w.frequency + g * kCandidates * kAxes;
    response = v.doubles + w.response + g * taps * kPassColumns;
    norms = v.doubles + w.norms + g * w.pass.tiles * kPassColumns;
  }

  __device__ int64_t state_offset() const {
    return op.row.state_offset + op.group * (kCandidates * candidate_size + 2 * op.s.axes);
  }
  // ||y_f||, the same in every block that asks.
  __device__ double length(int f) const {
    double square = 0;
    for (int64_t tile = 0; tile < op.work.pass.tiles; ++tile) {
      square += norms[tile * kPassColumns + 2 * f] + norms[tile * kPassColumns + 2 * f + 1];
    }
    return std::sqrt(square);
  }
  // Where the phase that a tap reads begins among the entries of x: worked out by prepare_symbol,
  // because it takes a dozen divisions.
  __device__ float* begins() const {
    const int64_t columns = op.work.pass.columns;
    return panel + (4 * vector_pitch(width) + op.s.taps) * columns;
  }
  __device__ int32_t entry(const Column& at) const {
    return std::bit_cast<int32_t>(begins()[at.tap]) + at.channel;
  }
};

// Angle of a point on the circle; axes are right-aligned.
__device__ inline double angle_on(const float* circle, const Stencil& s, int axis) {
  const int a = axis - (kAxes - s.axes);
  return a < 0 ? 0.0
               : std::atan2(static_cast<double>(circle[2 * a + 1]),
                            static_cast<double>(circle[2 * a]));
}

__device__ inline void write_angle(float* circle, const Stencil& s, int axis, double angle) {
  const int a = axis - (kAxes - s.axes);
  if (a < 0) return;
  double sine, cosine;
  sine_cosine(angle, sine, cosine);
  circle[2 * a] = static_cast<float>(cosine);
  circle[2 * a + 1] = static_cast<float>(sine);
}

// exp(-i w . offset) of every tap and candidate: (taps, F, 2).
__device__ inline void write_phases(const Symbol& y, const double* frequency, float* phase) {
  const Stencil& s = y.op.s;
  for (int32_t i = threadIdx.x; i < s.taps * kCandidates; i += kBlockThreads) {
    double sine, cosine;
    sine_cosine(
        angle_of(s, frequency + i % kCandidates * kAxes, point_of(s.kernel, i / kCandidates)), sine,
        cosine);
    phase[2 * i] = static_cast<float>(cosine);
    phase[2 * i + 1] = static_cast<float>(-sine);
  }
}

// What the pass reads (pass.h), per subset of candidates: x with the column scale, e, and where the
// phase of a tap begins.
__device__ inline void write_factors(const Symbol& y) {
  const Stencil& s = y.op.s;
  const PassShape& shape = y.op.work.pass;
  const int64_t pitch = vector_pitch(y.width);
  for (int subset = 0; subset < shape.subsets; ++subset) {
    float* x = y.panel + subset * shape.vector;
    float* e = x + 4 * pitch * shape.columns;
    float* begin = e + s.taps * shape.columns;
    for (int64_t i = threadIdx.x; i < y.width * shape.columns; i += kBlockThreads) {
      const int64_t entry = i % y.width, c = i / y.width, of_all = subset * shape.columns + c;
      const float plain = y.plain[2 * (of_all / 2 * y.width + entry) + of_all % 2];
      x[vector_slot(entry, pitch) * shape.columns + c] =
          plain * y.op.cs(static_cast<int32_t>(entry % s.channels));
    }
    for (int64_t i = threadIdx.x; i < s.taps * shape.columns; i += kBlockThreads) {
      const int64_t tap = i / shape.columns, c = i % shape.columns;
      e[i] = y.phase[tap * kPassColumns + subset * shape.columns + c];
    }
    for (int32_t tap = threadIdx.x; tap < s.taps; tap += kBlockThreads) {
      begin[tap] = std::bit_cast<float>(tap_phase(s, point_of(s.kernel, tap)) * s.channels);
    }
  }
}

// Unit vectors, phases, and what the weights multiply.
__device__ inline void prepare_symbol(const View& v, const Op& op) {
  const Symbol y(v, op);
  const Stencil& s = op.s;
  for (int f = 0; f < kCandidates; ++f) {
    const float* candidate = y.state + f * y.candidate_size;
    const float* x = candidate + 2 * s.axes;
    double square = 0;
    for (int32_t i = threadIdx.x; i < 2 * y.width; i += kBlockThreads) {
      square += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
    const float inverse = inverse_or_one(std::sqrt(Team<true>::sum(square)));
    for (int32_t i = threadIdx.x; i < 2 * y.width; i += kBlockThreads) {
      y.plain[f * 2 * y.width + i] = x[i] * inverse;
    }
    if (threadIdx.x < kAxes) {
      const int axis = static_cast<int>(threadIdx.x);
      y.frequency[f * kAxes + axis] = angle_on(candidate, s, axis);
    }
  }
  __syncthreads();
  write_phases(y, y.frequency, y.phase);
  __syncthreads();
  write_factors(y);
}

// What the identity adds to row o of the image, in panel column c.
__device__ inline float symbol_identity(const Symbol& y, int32_t o, int c) {
  const Stencil& s = y.op.s;
  const int32_t tap = centre_tap(s), f = c / 2;
  const float* x = y.plain + 2 * (f * y.width + y.entry({o, tap}));
  const float* e = y.phase + 2 * (tap * kCandidates + f);
  return c % 2 == 0 ? e[0] * x[0] - e[1] * x[1] : e[0] * x[1] + e[1] * x[0];
}

// q_t = sum over channels of conj(taps) x, (taps, F, 2) in double; one warp per tap and candidate.
__device__ inline void write_response(const Symbol& y) {
  const Stencil& s = y.op.s;
  for (int32_t i = Team<false>::number(); i < s.taps * kCandidates; i += Team<false>::per_block()) {
    const int32_t tap = i / kCandidates, f = i % kCandidates;
    const int32_t first = y.entry({0, tap});
    double re = 0, im = 0;
    for (int32_t c = Team<false>::rank(); c < s.channels; c += kWarpSize) {
      const float* b = y.back +
                       static_cast<int64_t>(column_of(s, y.op.tap_major(), c, tap)) * kPassColumns +
                       2 * f;
      const float* x = y.plain + 2 * (f * y.width + first + c);
      const double br = b[0], bi = b[1], xr = x[0], xi = x[1];
      re += br * xr + bi * xi;
      im += br * xi - bi * xr;
    }
    re = Team<false>::sum(re);
    im = Team<false>::sum(im);
    if (Team<false>::rank() == 0) {
      y.response[2 * i] = re;
      y.response[2 * i + 1] = im;
    }
  }
  __syncthreads();
}

struct Peak {
  float value;
  int32_t point;
};

// The grid point where |sum of q e|^2 is largest, the first of several.
__device__ inline Peak best_of_grid(const Symbol& y, const Grid& grid, int f) {
  const Stencil& s = y.op.s;
  Peak peak{-1.0f, grid.points()};
  for (int32_t i = threadIdx.x; i < grid.points(); i += kBlockThreads) {
    const Point point = point_of(grid.size, i);
    float re = 0.0f, im = 0.0f;
    for (int32_t tap = 0; tap < s.taps; ++tap) {
      const double* q = y.response + 2 * (tap * kCandidates + f);
      const float qr = static_cast<float>(q[0]), qi = static_cast<float>(q[1]);
      float n, c;
      sine_cosine_of_turns(grid_turns(s, grid, point, point_of(s.kernel, tap)), n, c);
      re = std::fma(qr, c, std::fma(qi, n, re));
      im = std::fma(qi, c, std::fma(-qr, n, im));
    }
    const float value = re * re + im * im;
    if (value > peak.value) peak = {value, i};
  }
  const float value = Team<true>::max(peak.value);
  const int32_t point = Team<true>::min(peak.value == value ? peak.point : grid.points());
  return {value, point};
}

// Sums the moments of candidate f over the taps by one warp; all lanes get them. Those of unused axes
// are zero.
__device__ inline Moments moments_of(const Symbol& y, int f, const double* w) {
  const Stencil& s = y.op.s;
  Moments m = {};
  for (int32_t tap = Team<false>::rank(); tap < s.taps; tap += kWarpSize) {
    const double* q = y.response + 2 * (tap * kCandidates + f);
    add_term(s, w, point_of(s.kernel, tap), q[0], q[1], m);
  }
  LMTFAST_UNROLL
  for (int part = 0; part < 2; ++part) {
    m.g[part] = Team<false>::sum(m.g[part]);
    LMTFAST_UNROLL
    for (int a = 0; a < kAxes; ++a) {
      if (a < kAxes - s.axes) continue;
      m.first[a][part] = Team<false>::sum(m.first[a][part]);
      LMTFAST_UNROLL
      for (int b = 0; b <= a; ++b) {
        if (b < kAxes - s.axes) continue;
        m.second[a][b][part] = m.second[b][a][part] = Team<false>::sum(m.second[a][b][part]);
      }
    }
  }
  return m;
}

// The response alone, squared.
__device__ inline double value_at(const Symbol& y, int f, const double* w) {
  const Stencil& s = y.op.s;
  double re = 0, im = 0;
  for (int32_t tap = Team<false>::rank(); tap < s.taps; tap += kWarpSize) {
    const double* q = y.response + 2 * (tap * kCandidates + f);
    double n, c;
    sine_cosine(angle_of(s, w, point_of(s.kernel, tap)), n, c);
    re += q[0] * c + q[1] * n;
    im += q[1] * c - q[0] * n;
  }
  re = Team<false>::sum(re);
  im = Team<false>::sum(im);
  return re * re + im * im;
}

// Divides the response of each candidate by its largest entry.
__device__ inline void scale_responses(const Symbol& y) {
  for (int f = 0; f < kCandidates; ++f) {
    double largest = 0;
    for (int32_t tap = threadIdx.x; tap < y.op.s.taps; tap += kBlockThreads) {
      const double* q = y.response + 2 * (tap * kCandidates + f);
      largest = std::fmax(largest, std::sqrt(q[0] * q[0] + q[1] * q[1]));
    }
    largest = Team<true>::max(largest);
    for (int32_t tap = threadIdx.x; tap < y.op.s.taps; tap += kBlockThreads) {
      double* q = y.response + 2 * (tap * kCandidates + f);
      q[0] /= largest > 0.0 ? largest : 1.0;
      q[1] /= largest > 0.0 ? largest : 1.0;
    }
  }
  __syncthreads();
}

// Moves each candidate's frequency to one where its response is no smaller: (F, 3) in `moved`. The
// block searches the grids, then a warp per candidate takes the Newton step.
__device__ inline void improve_frequencies(const Symbol& y, double (&moved)[kCandidates * kAxes]) {
  LMTFAST_SHARED(Peak, peaks, [kCandidates]);
  Grid grid;
  LMTFAST_UNROLL
  for (int a = 0; a < kAxes; ++a) grid.size[a] = static_cast<int32_t>(y.op.work.frequencies[a]);
  scale_responses(y);
  for (int f = 0; f < kCandidates; ++f) {
    const Peak peak = best_of_grid(y, grid, f);
    if (threadIdx.x == 0) peaks[f] = peak;
  }
  __syncthreads();
  const int f = Team<false>::number();
  if (f < kCandidates) {
    double w[kAxes], trial[kAxes];
    LMTFAST_UNROLL
    for (int a = 0; a < kAxes; ++a) w[a] = y.frequency[f * kAxes + a];
    if (grid.points() > 1) {
      const Peak peak = peaks[f];
      const Point point = point_of(grid.size, peak.point < grid.points() ? peak.point : 0);
      Moments m = moments_of(y, f, w);
      if (static_cast<double>(peak.value) > value_of(m)) {
        LMTFAST_UNROLL
        for (int a = 0; a < kAxes; ++a) w[a] = grid_frequency(grid, point, a);
        m = moments_of(y, f, w);
      }
      newton_step(y.op.s, m, w, trial);
      const bool higher = value_at(y, f, trial) > value_of(m);
      LMTFAST_UNROLL
      for (int a = 0; a < kAxes; ++a) w[a] = wrapped(higher ? trial[a] : w[a]);
    }
    const int axis = Team<false>::rank();
    if (axis < kAxes) moved[f * kAxes + axis] = axis == 0 ? w[0] : axis == 1 ? w[1] : w[2];
  }
  __syncthreads();
}

// x = A(w)^H u at the new frequencies, and ||x|| per candidate.
__device__ inline void next_vectors(const Symbol& y, const float* phase,
                                    double (&reached)[kCandidates]) {
  const Stencil& s = y.op.s;
  for (int f = 0; f < kCandidates; ++f) {
    double square = 0;
    for (int32_t i = threadIdx.x; i < y.width; i += kBlockThreads) {
      const int32_t channel = i % s.channels;
      float re = 0.0f, im = 0.0f;
      for (int32_t tap = 0; tap < s.taps; ++tap) {
        if (y.entry({0, tap}) != i - channel) continue;
        const float* b =
            y.back +
            static_cast<int64_t>(column_of(s, y.op.tap_major(), channel, tap)) * kPassColumns +
            2 * f;
        const float* e = phase + 2 * (tap * kCandidates + f);
        // times conj(e)
        re += b[0] * e[0] + b[1] * e[1];
        im += b[1] * e[0] - b[0] * e[1];
      }
      y.fresh[2 * (f * y.width + i)] = re;
      y.fresh[2 * (f * y.width + i) + 1] = im;
      square += static_cast<double>(re) * re + static_cast<double>(im) * im;
    }
    const double total = Team<true>::sum(square);
    if (threadIdx.x == 0) reached[f] = std::sqrt(total);
  }
  __syncthreads();
}

// Increments of the Kronecker sequence per axis: powers of the root of x^(axes + 1) = x + 1.
LMTFAST_HD double kronecker_step(int axes, int axis) {
  const double root = axes == 1   ? 1.6180339887498949
                      : axes == 2 ? 1.3247179572447461
                                  : 1.2207440846057596;
  double power = 1.0;
  for (int i = 0; i <= axis; ++i) power /= root;
  return kTwoPi * power;
}

// From the adjoint's panel to the new state.
__device__ inline void finish_symbol(const View& v, const Op& op) {
  LMTFAST_SHARED(double, moved, [kCandidates * kAxes]);
  LMTFAST_SHARED(double, reached, [kCandidates]);
  const Symbol y(v, op);
  const Stencil& s = op.s;
  write_response(y);
  improve_frequencies(y, moved);
  // `response` has served; its memory takes the phases at the new frequencies.
  float* phase = reinterpret_cast<float*>(y.response);
  write_phases(y, moved, phase);
  __syncthreads();
  next_vectors(y, phase, reached);

  // A stalled explorer replaces a worse candidate and starts at the next frequency.
  const bool stalled = reached[kCandidates - 1] <= y.length(kCandidates - 1) * (1.0 + kStalled);
  int worst = 0;
  for (int f = 1; f < kCandidates - 1; ++f) worst = reached[f] < reached[worst] ? f : worst;
  const bool promoted = stalled && reached[kCandidates - 1] > reached[worst];
  float* state = v.new_state + y.state_offset();
  const float* old_anchor = y.state + kCandidates * y.candidate_size;
  float* anchor = state + kCandidates * y.candidate_size;
  for (int f = 0; f < kCandidates; ++f) {
    const int from = promoted && f == worst ? kCandidates - 1 : f;
    const bool restart = stalled && f == kCandidates - 1;
    const bool usable = reached[from] > 0.0 && reached[from] - reached[from] == 0.0;
    const float* x = (usable ? y.fresh : y.plain) + from * 2 * y.width;
    const float inverse = usable ? inverse_or_one(reached[from]) : 1.0f;
    float* candidate = state + f * y.candidate_size;
    for (int32_t i = threadIdx.x; i < 2 * y.width; i += kBlockThreads) {
      // A shifted singular vector is as good a start as a random one.
      const int32_t source = restart ? (i + 2 * y.width - 2) % (2 * y.width) : i;
      candidate[2 * s.axes + i] = x[source] * inverse;
    }
    if (threadIdx.x < kAxes) {
      const int axis = static_cast<int>(threadIdx.x);
      const double kept = (usable ? moved : y.frequency)[from * kAxes + axis];
      const double next = angle_on(old_anchor, s, axis) +
                          (stalled ? kronecker_step(s.axes, axis - (kAxes - s.axes)) : 0.0);
      write_angle(candidate, s, axis, restart ? next : kept);
      if (f == 0) write_angle(anchor, s, axis, next);
    }
  }
}

// Sigma and the saved vectors of the best candidate of all groups, the first of several.
__device__ inline void record_symbol(const View& v, int32_t index) {
  const Op any(v, index, 0);
  const Stencil& s = any.s;
  double best = 0;
  int winner = -1;
  for (int g = 0; g < s.groups; ++g) {
    const Op op(v, index, g);
    const Symbol y(v, op);
    for (int f = 0; f < kCandidates; ++f) {
      const double value = y.length(f);
      // NaN wins, and stays.
      if (winner < 0 || value > best || (value != value && best == best)) {
        best = value;
        winner = g * kCandidates + f;
      }
    }
  }
  const Op op(v, index, winner / kCandidates);
  const Symbol y(v, op);
  const int f = winner % kCandidates;
  float* group = v.saved + any.row.saved_offset;
  float* u = group + 1;
  float* z = u + 2 * s.rows;
  float* p = z + 2 * s.columns;
  const float inverse = inverse_or_one(best);
  const float* pure =
      v.floats + any.work.pure + static_cast<int64_t>(op.group) * s.rows * kPassColumns;
  if (threadIdx.x == 0) {
    *group = static_cast<float>(op.group);
    v.sigmas[index] = static_cast<float>(best);
  }
  for (int32_t i = threadIdx.x; i < 2 * s.rows; i += kBlockThreads) {
    const int64_t at = static_cast<int64_t>(i / 2) * kPassColumns + 2 * f + i % 2;
    u[i] = y.image[at] * inverse;
    p[i] = pure[at];
  }
  // In the order of (channel, tap), without the column scale.
  for (int32_t i = threadIdx.x; i < s.columns; i += kBlockThreads) {
    const Column at{i / s.taps, i % s.taps};
    const float* x = y.plain + 2 * (f * y.width + y.entry(at));
    const float* e = y.phase + 2 * (at.tap * kCandidates + f);
    z[2 * i] = e[0] * x[0] - e[1] * x[1];
    z[2 * i + 1] = e[0] * x[1] + e[1] * x[0];
  }
}

}  // namespace lmtfast::cuda
