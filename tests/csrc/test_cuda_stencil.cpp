// SPDX-License-Identifier: MIT
// Index arithmetic of the CUDA kernels on the CPU, against what the definitions say in plain loops.
#include <cmath>
#include <complex>
#include <random>
#include <vector>

#include "check.h"
#include "ops/cuda/frequency.h"
#include "ops/cuda/stencil.h"

using namespace lmtfast::cuda;

namespace {

struct Case {
  std::vector<int64_t> in, kernel, stride, low, high, dilation;
  bool circular;
};

const std::vector<Case> kCases = {
    {{5, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}, false},
    {{7, 5}, {2, 4}, {1, 1}, {0, 2}, {1, 1}, {1, 1}, false},
    {{9, 8}, {3, 2}, {2, 3}, {1, 0}, {0, 2}, {1, 2}, false},
    {{11, 12}, {2, 2}, {3, 4}, {0, 1}, {0, 1}, {1, 1}, false},
    {{6, 7}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}, true},
    {{6, 8}, {3, 3}, {2, 2}, {1, 1}, {1, 1}, {1, 1}, true},
    {{5, 4}, {5, 3}, {1, 2}, {5, 4}, {5, 4}, {2, 1}, true},
    {{17}, {5}, {2}, {2}, {1}, {1}, false},
    {{3, 4, 5}, {3, 1, 2}, {1, 1, 2}, {1, 0, 1}, {1, 0, 1}, {1, 1, 1}, false},
    {{1, 1}, {3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}, false},
};

OpRow row_of(const Case& c) {
  OpRow row = {};
  row.kind = 1;
  row.axes = static_cast<int64_t>(c.in.size());
  row.groups = 2;
  row.rows = 3;
  row.channels = 4;
  row.circular = c.circular;
  for (int64_t a = 0; a < kAxes; ++a) {
    const int64_t i = a - (kAxes - row.axes);
    row.in[a] = i < 0 ? 1 : c.in[i];
    row.kernel[a] = i < 0 ? 1 : c.kernel[i];
    row.stride[a] = i < 0 ? 1 : c.stride[i];
    row.dilation[a] = i < 0 ? 1 : c.dilation[i];
    row.pad_low[a] = i < 0 ? 0 : c.low[i];
    row.pad_high[a] = i < 0 ? 0 : c.high[i];
    row.out[a] =
        (row.in[a] + row.pad_low[a] + row.pad_high[a] - row.dilation[a] * (row.kernel[a] - 1) - 1) /
            row.stride[a] +
        1;
  }
  return row;
}

// The input index that a padded coordinate of one axis reads, by laying the padding out.
int64_t naive_read(const OpRow& row, int axis, int64_t padded) {
  std::vector<int64_t> line;
  const int64_t n = row.in[axis], low = row.pad_low[axis], high = row.pad_high[axis];
  for (int64_t i = low; i > 0; --i) line.push_back(row.circular ? n - i : -1);
  for (int64_t i = 0; i < n; ++i) line.push_back(i);
  for (int64_t i = 0; i < high; ++i) line.push_back(row.circular ? i : -1);
  return line.at(static_cast<size_t>(padded));
}

int64_t naive_input(const OpRow& row, const Point& p, const Point& t) {
  int64_t position = 0;
  for (int a = 0; a < kAxes; ++a) {
    const int64_t i = naive_read(row, a, row.stride[a] * p.at[a] + row.dilation[a] * t.at[a]);
    position = position < 0 || i < 0 ? -1 : position * row.in[a] + i;
  }
  return position;
}

void test_reads_and_their_adjoint() {
  for (const Case& c : kCases) {
    const OpRow row = row_of(c);
    const Stencil s = stencil_of(row);
    // How often each output's tap reads each input, one way and the other.
    std::vector<int> forward(static_cast<size_t>(s.taps) * s.outputs * s.inputs, 0);
    std::vector<int> backward(forward.size(), 0);
    const auto at = [&](int32_t t, int32_t p, int32_t q) {
      return (static_cast<size_t>(t) * s.outputs + p) * s.inputs + q;
    };
    for (int32_t t = 0; t < s.taps; ++t) {
      const Point tap = point_of(s.kernel, t);
      for (int32_t p = 0; p < s.outputs; ++p) {
        const Point output = point_of(s.out, p);
        const int32_t q = input_of(s, output, tap);
        CHECK(q == naive_input(row, output, tap));
        if (q >= 0) ++forward[at(t, p, q)];
      }
      for (int32_t q = 0; q < s.inputs; ++q) {
        for (int32_t wrap = 0; wrap < wraps_of(s); ++wrap) {
          const int32_t p = output_of(s, point_of(s.in, q), tap, wrap_of(s, wrap));
          CHECK(p >= -1 && p < s.outputs);
          if (p >= 0) ++backward[at(t, p, q)];
        }
      }
    }
    CHECK(forward == backward);
  }
}

void test_points_and_columns() {
  const int32_t extent[] = {2, 3, 5};
  int32_t index = 0;
  for (int32_t z = 0; z < 2; ++z) {
    for (int32_t y = 0; y < 3; ++y) {
      for (int32_t x = 0; x < 5; ++x) {
        const Point p = point_of(extent, index++);
        CHECK(p.at[0] == z && p.at[1] == y && p.at[2] == x);
      }
    }
  }
  const Stencil s = stencil_of(row_of(kCases[0]));
  for (const bool tap_major : {false, true}) {
    std::vector<int> seen(static_cast<size_t>(s.columns), 0);
    for (int32_t c = 0; c < s.channels; ++c) {
      for (int32_t t = 0; t < s.taps; ++t) {
        const int32_t column = column_of(s, tap_major, c, t);
        CHECK(column == (tap_major ? t * 4 + c : c * 9 + t));
        ++seen[column];
        const Column back = column_at(s, tap_major, column);
        CHECK(back.channel == c && back.tap == t);
      }
    }
    for (const int count : seen) CHECK(count == 1);
  }
}

void test_the_centre_tap_reads_its_own_position() {
  const Stencil s = stencil_of(row_of(kCases[0]));
  const Point centre = point_of(s.kernel, centre_tap(s));
  for (int32_t p = 0; p < s.outputs; ++p) CHECK(input_of(s, point_of(s.out, p), centre) == p);
  const Case dilated = {{9, 7}, {5, 3}, {1, 1}, {4, 1}, {4, 1}, {2, 1}, false};
  const Stencil d = stencil_of(row_of(dilated));
  CHECK(centre_tap(d) == 2 * 3 + 1);
}

// A tap reads input stride * offset + phase of the output's own place, at any stride; at stride 1
// its offset is its number.
void test_offsets_and_phases() {
  for (const Case& c : kCases) {
    const Stencil s = stencil_of(row_of(c));
    for (int32_t t = 0; t < s.taps; ++t) {
      const Point tap = point_of(s.kernel, t);
      int64_t phase = 0;
      for (int a = 0; a < kAxes; ++a) {
        const int64_t reads = s.dilation[a] * tap.at[a] - s.pad[a];
        const auto offset =
            static_cast<int64_t>(std::floor(static_cast<double>(reads) / s.stride[a]));
        const int64_t rest = reads - offset * s.stride[a];
        CHECK(rest >= 0 && rest < s.stride[a]);
        phase = phase * s.stride[a] + rest;
        CHECK(symbol_offset(s, a, tap.at[a]) == (s.stride[a] == 1 ? tap.at[a] : offset));
      }
      CHECK(tap_phase(s, tap) == phase);
    }
  }
  CHECK(floor_divide(-1, 3) == -1 && floor_divide(-3, 3) == -1 && floor_divide(5, 3) == 1);
}

double value_at(const Stencil& s, const std::vector<std::complex<double>>& q, const double* w) {
  std::complex<double> sum = 0;
  for (int32_t t = 0; t < s.taps; ++t) {
    sum += q[t] * std::polar(1.0, -angle_of(s, w, point_of(s.kernel, t)));
  }
  return std::norm(sum);
}

void test_grid_and_newton() {
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal;
  for (const Case& c : kCases) {
    const Stencil s = stencil_of(row_of(c));
    const Grid grid = grid_of(s);
    CHECK(grid.points() <= kMaxPoints);
    std::vector<std::complex<double>> q(static_cast<size_t>(s.taps));
    for (auto& x : q) x = {normal(random), normal(random)};
    double best = -1, w[kAxes] = {};
    for (int32_t i = 0; i < grid.points(); ++i) {
      const Point point = point_of(grid.size, i);
      double at[kAxes];
      for (int a = 0; a < kAxes; ++a) at[a] = grid_frequency(grid, point, a);
      // Turns are the angle but for whole ones.
      for (int32_t t = 0; t < s.taps; ++t) {
        const Point tap = point_of(s.kernel, t);
        const double turns = angle_of(s, at, tap) / kTwoPi - grid_turns(s, grid, point, tap);
        CHECK_NEAR(turns, std::round(turns), 1e-5);
      }
      const double value = value_at(s, q, at);
      if (value > best) {
        best = value;
        for (int a = 0; a < kAxes; ++a) w[a] = at[a];
      }
    }
    Moments m = {};
    for (int32_t t = 0; t < s.taps; ++t) {
      add_term(s, w, point_of(s.kernel, t), q[t].real(), q[t].imag(), m);
    }
    CHECK_NEAR(value_of(m), best, 1e-9 * best);
    // The step follows the gradient and Hessian that finite differences give.
    double trial[kAxes];
    newton_step(s, m, w, trial);
    for (int a = 0; a < kAxes - s.axes; ++a) CHECK(trial[a] == w[a]);
    CHECK(value_at(s, q, trial) >= best * (1 - 1e-12));
    for (int steps = 0; steps < 6; ++steps) {
      Moments next = {};
      for (int a = 0; a < kAxes; ++a) w[a] = trial[a];
      for (int32_t t = 0; t < s.taps; ++t) {
        add_term(s, w, point_of(s.kernel, t), q[t].real(), q[t].imag(), next);
      }
      newton_step(s, next, w, trial);
    }
    const double h = 1e-4, top = value_at(s, q, trial);
    for (int a = kAxes - s.axes; a < kAxes; ++a) {
      double left[kAxes], right[kAxes];
      for (int b = 0; b < kAxes; ++b) left[b] = right[b] = trial[b];
      left[a] -= h;
      right[a] += h;
      const double slope = (value_at(s, q, right) - value_at(s, q, left)) / (2 * h);
      CHECK_NEAR(slope, 0.0, 1e-5 * (1 + top));
    }
  }
  const Case long_line = {{5000}, {3000}, {1}, {0}, {0}, {1}, false};
  CHECK(grid_of(stencil_of(row_of(long_line))).points() <= kMaxPoints);
}

void test_angles_are_wrapped() {
  const double pi = kTwoPi / 2;
  for (double angle = -20; angle < 20; angle += 0.37) {
    const double near = wrapped(angle), turns = (angle - near) / kTwoPi;
    CHECK(near >= -pi && near < pi + 1e-12);
    CHECK_NEAR(turns, std::round(turns), 1e-12);
  }
}

}  // namespace

int main() {
  test_reads_and_their_adjoint();
  test_points_and_columns();
  test_the_centre_tap_reads_its_own_position();
  test_offsets_and_phases();
  test_grid_and_newton();
  test_angles_are_wrapped();
  return check::report();
}
