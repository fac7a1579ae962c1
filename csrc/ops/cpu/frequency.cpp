// SPDX-License-Identifier: MIT
#include "ops/cpu/frequency.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>

#include "core/dispatch.h"
#include "core/vector_math.h"

namespace lmtfast::cpu {
namespace {

constexpr int kAxes = LMTFAST_OP_ROW_AXES;
constexpr double kTurn = 2 * std::numbers::pi;
// Grid points per axis and degree of the symbol, and of one grid.
constexpr int64_t kGridDensity = 4;
constexpr int64_t kMaxPoints = 4096;
// An axis with fewer points is not coarsened.
constexpr int64_t kFewPoints = 8;

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// One axis of a stencil: offsets and phases of its taps, and the symbol's degree.
struct Axis {
  int64_t stride, dilation, low, kernel;

  Axis(const lmtfast_op_row& row, int axis)
      : stride(row.stride[axis]),
        dilation(row.dilation[axis]),
        low(row.pad_low[axis]),
        kernel(row.kernel[axis]) {}

  int64_t coarse(int64_t tap) const { return floor_div(tap * dilation - low, stride); }
  // Without a stride, padding only turns the symbol and dilation only stretches its axis.
  int64_t offset(int64_t tap) const { return stride == 1 ? tap : coarse(tap); }
  int64_t phase(int64_t tap) const { return tap * dilation - low - coarse(tap) * stride; }
  int64_t degree() const { return stride == 1 ? kernel - 1 : coarse(kernel - 1) - coarse(0); }
};

// sum += a (re + i im)
LMTFAST_INLINE void add_product(const Complex& a, double re, double im, Complex& sum) {
  for (int f = 0; f < kCandidates; ++f) {
    sum.re[f] += a.re[f] * re - a.im[f] * im;
    sum.im[f] += a.re[f] * im + a.im[f] * re;
  }
}

LMTFAST_INLINE Complex product(const Complex& a, const Complex& b) {
  Complex c;
  for (int f = 0; f < kCandidates; ++f) {
    c.re[f] = a.re[f] * b.re[f] - a.im[f] * b.im[f];
    c.im[f] = a.re[f] * b.im[f] + a.im[f] * b.re[f];
  }
  return c;
}

// m^-1 = adjugate / determinant, for n = 1, 2, 3.
void determinant_adjugate(const double (&m)[kAxes][kAxes], int64_t n,
                          double (&adjugate)[kAxes][kAxes], double& determinant) {
  if (n == 1) {
    adjugate[0][0] = 1.0;
    determinant = m[0][0];
  } else if (n == 2) {
    adjugate[0][0] = m[1][1];
    adjugate[0][1] = -m[0][1];
    adjugate[1][0] = -m[1][0];
    adjugate[1][1] = m[0][0];
    determinant = m[0][0] * m[1][1] - m[0][1] * m[1][0];
  } else {
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) {
        const int a = (j + 1) % 3, b = (j + 2) % 3, c = (i + 1) % 3, d = (i + 2) % 3;
        adjugate[i][j] = m[a][c] * m[b][d] - m[a][d] * m[b][c];
      }
    }
    determinant = 0.0;
    for (int j = 0; j < 3; ++j) determinant += m[0][j] * adjugate[j][0];
  }
}

// A grid of frequencies: per axis (kernel, points) tables of exp(-i w offset).
struct Grid {
  const int64_t *kernel, *points;
  const double *cosine[kAxes], *sine[kAxes];
};

// A number of each candidate, in one register where there are vector types.
#if defined(__GNUC__) || defined(__clang__)
typedef double Numbers __attribute__((vector_size(8 * kCandidates)));
LMTFAST_INLINE double number(const Numbers& x, int f) { return x[f]; }
#else
struct Numbers {
  double of[kCandidates];
  Numbers& operator+=(const Numbers& b) {
    for (int f = 0; f < kCandidates; ++f) of[f] += b.of[f];
    return *this;
  }
  Numbers operator*(double b) const {
    Numbers c = *this;
    for (double& v : c.of) v *= b;
    return c;
  }
};
LMTFAST_INLINE double number(const Numbers& x, int f) { return x.of[f]; }
#endif

// The same as add_product, in registers.
struct Sum {
  Numbers re, im;
};
static_assert(sizeof(Sum) == sizeof(Complex));

LMTFAST_INLINE void add_product(const Complex& a, double re, double im, Sum& sum) {
  Numbers ar, ai;
  std::memcpy(&ar, a.re, sizeof(ar));
  std::memcpy(&ai, a.im, sizeof(ai));
  sum.re += ar * re;
  sum.re += ai * -im;
  sum.im += ar * im;
  sum.im += ai * re;
}

// The largest |response|^2 of the grid and where it is. The grid is a product, so axis by axis; work
// holds a plane of taps and a line of them.
LMTFAST_INLINE void scan_body(const Grid& grid, const Complex* response, Complex* plane,
                              double* peak, int64_t* index) {
  const int64_t *kernel = grid.kernel, *points = grid.points, inner = kernel[1] * kernel[2];
  Complex* line = plane + inner;
  std::fill(peak, peak + kCandidates, -1.0);
  std::fill(index, index + kCandidates, 0);
  int64_t here = 0;
  for (int64_t i = 0; i < points[0]; ++i) {
    for (int64_t n = 0; n < inner; ++n) {
      Sum sum{};
      for (int64_t t = 0; t < kernel[0]; ++t) {
        const int64_t at = t * points[0] + i;
        add_product(response[t * inner + n], grid.cosine[0][at], grid.sine[0][at], sum);
      }
      std::memcpy(&plane[n], &sum, sizeof(sum));
    }
    for (int64_t j = 0; j < points[1]; ++j) {
      for (int64_t n = 0; n < kernel[2]; ++n) {
        Sum sum{};
        for (int64_t t = 0; t < kernel[1]; ++t) {
          const int64_t at = t * points[1] + j;
          add_product(plane[t * kernel[2] + n], grid.cosine[1][at], grid.sine[1][at], sum);
        }
        std::memcpy(&line[n], &sum, sizeof(sum));
      }
      for (int64_t k = 0; k < points[2]; ++k, ++here) {
        Sum sum{};
        for (int64_t t = 0; t < kernel[2]; ++t) {
          const int64_t at = t * points[2] + k;
          add_product(line[t], grid.cosine[2][at], grid.sine[2][at], sum);
        }
        for (int f = 0; f < kCandidates; ++f) {
          const double re = number(sum.re, f), im = number(sum.im, f);
          if (re * re + im * im > peak[f]) {
            peak[f] = re * re + im * im;
            index[f] = here;
          }
        }
      }
    }
  }
}

void scan_baseline(const Grid& grid, const Complex* response, Complex* work, double* peak,
                   int64_t* index) {
  scan_body(grid, response, work, peak, index);
}

#if LMTFAST_X86_CLONES
__attribute__((target("avx2,fma"))) void scan_avx2(const Grid& grid, const Complex* response,
                                                   Complex* work, double* peak, int64_t* index) {
  scan_body(grid, response, work, peak, index);
}
#endif

}  // namespace

Spectrum::Spectrum(const lmtfast_op_row& row) : axes_(row.axes) {
  for (int axis = 0; axis < kAxes; ++axis) {
    const Axis a(row, axis);
    kernel_[axis] = a.kernel;
    grid_[axis] = a.degree() > 0 ? kGridDensity * (a.degree() + 1) : 1;
  }
  const auto largest = [&] { return std::max_element(grid_, grid_ + kAxes); };
  while (volume(grid_) > kMaxPoints && *largest() > kFewPoints) *largest() = (*largest() + 1) / 2;
  for (int axis = 0; axis < kAxes; ++axis) {
    const Axis a(row, axis);
    const int64_t points = grid_[axis];
    std::vector<double> cosine(points), sine(points);
    for (int64_t i = 0; i < points; ++i) {
      const double angle = -kTurn * static_cast<double>(i) / static_cast<double>(points);
      cosine[i] = std::cos(angle);
      sine[i] = std::sin(angle);
    }
    for (int64_t tap = 0; tap < kernel_[axis]; ++tap) {
      const int64_t offset = a.offset(tap), step = offset - floor_div(offset, points) * points;
      along_[axis].push_back(offset);
      for (int64_t point = 0, i = 0; point < points; ++point, i = (i + step) % points) {
        cosine_[axis].push_back(cosine[i]);
        sine_[axis].push_back(sine[i]);
      }
    }
  }
  const int64_t n = volume(row.kernel);
  phase_.reserve(n);
  offset_.reserve(n * axes_);
  for (int64_t tap = 0; tap < n; ++tap) {
    const int64_t t[kAxes] = {tap / (kernel_[1] * kernel_[2]), tap / kernel_[2] % kernel_[1],
                              tap % kernel_[2]};
    int64_t number = 0;
    for (int axis = 0; axis < kAxes; ++axis) {
      const Axis a(row, axis);
      number = number * a.stride + a.phase(t[axis]);
      if (axis >= kAxes - axes_) offset_.push_back(static_cast<double>(a.offset(t[axis])));
    }
    phase_.push_back(number);
  }
}

// Products of powers: two sines and cosines per axis instead of one per tap.
void Spectrum::terms(const Frequencies& w, Complex* terms) const {
  const auto power = [](double angle, Complex& e, int f) {
    e.re[f] = std::cos(angle);
    e.im[f] = -std::sin(angle);
  };
  Complex one{};
  std::fill(one.re, one.re + kCandidates, 1.0);
  terms[0] = one;
  int64_t n = 1;
  std::vector<Complex> factors;
  for (int64_t a = 0; a < axes_; ++a) {
    const std::vector<int64_t>& offsets = along_[a + kAxes - axes_];
    Complex step, factor;
    for (int f = 0; f < kCandidates; ++f) {
      power(w[a][f], step, f);
      power(w[a][f] * static_cast<double>(offsets.front()), factor, f);
    }
    factors.clear();
    for (size_t t = 0; t < offsets.size(); ++t) {
      for (int64_t turn = t > 0 ? offsets[t - 1] : offsets[t]; turn < offsets[t]; ++turn) {
        factor = product(factor, step);
      }
      factors.push_back(factor);
    }
    // From the end, so that what is still needed is not overwritten.
    const auto width = static_cast<int64_t>(factors.size());
    for (int64_t t = n - 1; t >= 0; --t) {
      const Complex before = terms[t];
      for (int64_t k = width - 1; k >= 0; --k) terms[t * width + k] = product(before, factors[k]);
    }
    n *= width;
  }
}

void Spectrum::improve(Complex* response, Frequencies& w) const {
  if (volume(grid_) == 1) return;
  double largest[kCandidates] = {};
  for (int64_t t = 0; t < taps(); ++t) {
    for (int f = 0; f < kCandidates; ++f) {
      largest[f] =
          std::max({largest[f], std::fabs(response[t].re[f]), std::fabs(response[t].im[f])});
    }
  }
  for (int64_t t = 0; t < taps(); ++t) {
    for (int f = 0; f < kCandidates; ++f) {
      response[t].re[f] /= largest[f] > 0 ? largest[f] : 1.0;
      response[t].im[f] /= largest[f] > 0 ? largest[f] : 1.0;
    }
  }
  double peak[kCandidates];
  int64_t index[kCandidates];
  best_of_grid(response, peak, index);
  Complex value{};
  std::vector<Complex> factors(static_cast<size_t>(taps()));
  terms(w, factors.data());
  for (int64_t t = 0; t < taps(); ++t) {
    add_product(product(response[t], factors[t]), 1.0, 0.0, value);
  }
  for (int f = 0; f < kCandidates; ++f) {
    if (!(peak[f] > value.re[f] * value.re[f] + value.im[f] * value.im[f])) continue;
    int64_t rest = index[f];
    for (int axis = kAxes - 1; axis >= kAxes - axes_; --axis) {
      w[axis - (kAxes - axes_)][f] =
          static_cast<double>(rest % grid_[axis]) * (kTurn / static_cast<double>(grid_[axis]));
      rest /= grid_[axis];
    }
  }
  newton(response, w);
}

void Spectrum::best_of_grid(const Complex* response, double* peak, int64_t* index) const {
  std::vector<Complex> work(static_cast<size_t>(kernel_[1] * kernel_[2] + kernel_[2]));
  Grid grid{kernel_, grid_, {}, {}};
  for (int axis = 0; axis < kAxes; ++axis) {
    grid.cosine[axis] = cosine_[axis].data();
    grid.sine[axis] = sine_[axis].data();
  }
#if LMTFAST_X86_CLONES
  if (best_isa() != Isa::kBaseline) return scan_avx2(grid, response, work.data(), peak, index);
#endif
  scan_baseline(grid, response, work.data(), peak, index);
}

// f = |g|^2 of one candidate, its gradient and Hessian, where g is the sum over taps.
struct Spectrum::Moments {
  double value[kCandidates];
  double gradient[kAxes][kCandidates];
  double hessian[kAxes][kAxes][kCandidates];
};

Spectrum::Moments Spectrum::moments(const Complex* response, const Frequencies& w) const {
  Complex g{}, first[kAxes] = {}, second[kAxes][kAxes] = {};
  std::vector<Complex> factors(static_cast<size_t>(taps()));
  terms(w, factors.data());
  for (int64_t t = 0; t < taps(); ++t) {
    const Complex term = product(response[t], factors[t]);
    add_product(term, 1.0, 0.0, g);
    for (int64_t a = 0; a < axes_; ++a) {
      const double tau = offset_[t * axes_ + a];
      add_product(term, 0.0, -tau, first[a]);
      for (int64_t b = 0; b < axes_; ++b) {
        add_product(term, -tau * offset_[t * axes_ + b], 0.0, second[a][b]);
      }
    }
  }
  Moments m;
  for (int f = 0; f < kCandidates; ++f) {
    m.value[f] = g.re[f] * g.re[f] + g.im[f] * g.im[f];
    for (int64_t a = 0; a < axes_; ++a) {
      const double ar = first[a].re[f], ai = first[a].im[f];
      m.gradient[a][f] = 2 * (g.re[f] * ar + g.im[f] * ai);
      for (int64_t b = 0; b < axes_; ++b) {
        m.hessian[a][b][f] = 2 * (ar * first[b].re[f] + ai * first[b].im[f] +
                                  g.re[f] * second[a][b].re[f] + g.im[f] * second[a][b].im[f]);
      }
    }
  }
  return m;
}

// The better of w and a Newton step, damped where the maximum is not yet concave around w.
void Spectrum::newton(const Complex* response, Frequencies& w) const {
  const Moments m = moments(response, w);
  Frequencies trial;
  for (int f = 0; f < kCandidates; ++f) {
    // Gershgorin: without damping the Hessian is negative definite where this is negative.
    double edge = -HUGE_VAL, steepest = 0.0;
    for (int64_t a = 0; a < axes_; ++a) {
      const double diagonal = m.hessian[a][a][f];
      double reach = diagonal - std::fabs(diagonal);
      for (int64_t b = 0; b < axes_; ++b) reach += std::fabs(m.hessian[a][b][f]);
      edge = std::max(edge, reach);
      steepest = std::max(steepest, std::fabs(diagonal));
    }
    const double damping = edge < 0 ? 0.0 : edge + 1e-3 * steepest;
    double matrix[kAxes][kAxes] = {}, adjugate[kAxes][kAxes] = {}, determinant = 0.0;
    for (int64_t a = 0; a < axes_; ++a) {
      for (int64_t b = 0; b < axes_; ++b) matrix[a][b] = m.hessian[a][b][f];
      matrix[a][a] -= damping;
    }
    determinant_adjugate(matrix, axes_, adjugate, determinant);
    for (int64_t a = 0; a < axes_; ++a) {
      double move = 0.0;
      for (int64_t b = 0; b < axes_; ++b) move += adjugate[a][b] * m.gradient[b][f];
      trial[a][f] = w[a][f] - move / determinant;
    }
  }
  const Moments reached = moments(response, trial);
  for (int f = 0; f < kCandidates; ++f) {
    for (int64_t a = 0; a < axes_; ++a) {
      const double better = reached.value[f] > m.value[f] ? trial[a][f] : w[a][f];
      w[a][f] = better - kTurn * std::floor((better + std::numbers::pi) / kTurn);
    }
  }
}

}  // namespace lmtfast::cpu
