// SPDX-License-Identifier: MIT
// Searches over frequencies on the CPU, as lmtfast/engines/frequency.py does them, in double. All
// candidates of a group move together: arrays end in [kCandidates].
#pragma once

#include <cstdint>
#include <vector>

#include "ops/spectral.h"

namespace lmtfast::cpu {

constexpr int kCandidates = LMTFAST_CANDIDATES;

// Complex numbers of all candidates.
struct Complex {
  double re[kCandidates];
  double im[kCandidates];
};

// A frequency per candidate: w[axis][candidate], as many axes as the operator has.
using Frequencies = double[LMTFAST_OP_ROW_AXES][kCandidates];

// Geometry of an operator's symbol, A(w) = sum over taps of W_t exp(-i w . offset_t): what a tap
// adds to the frequency, and the phase of the strided input that it reads.
class Spectrum {
 public:
  explicit Spectrum(const lmtfast_op_row& row);

  int64_t axes() const { return axes_; }
  int64_t taps() const { return static_cast<int64_t>(phase_.size()); }
  int64_t phase(int64_t tap) const { return phase_[tap]; }

  // terms[t] = exp(-i w . offset_t)
  void terms(const Frequencies& w, Complex* terms) const;

  // Moves each w to one where |sum over taps of response_t exp(-i w . offset_t)| is no smaller: the
  // best of a grid and w, then a Newton step. Scales `response` (taps) in place.
  void improve(Complex* response, Frequencies& w) const;

 private:
  struct Moments;

  void best_of_grid(const Complex* response, double* peak, int64_t* index) const;
  Moments moments(const Complex* response, const Frequencies& w) const;
  void newton(const Complex* response, Frequencies& w) const;

  int64_t axes_;
  int64_t kernel_[LMTFAST_OP_ROW_AXES];
  int64_t grid_[LMTFAST_OP_ROW_AXES];  // points per axis
  std::vector<int64_t> phase_;
  std::vector<double> offset_;                       // (taps, axes)
  std::vector<int64_t> along_[LMTFAST_OP_ROW_AXES];  // (kernel): offsets of one axis
  std::vector<double> cosine_[LMTFAST_OP_ROW_AXES];  // (kernel, grid) of -2 pi offset point / grid
  std::vector<double> sine_[LMTFAST_OP_ROW_AXES];
};

}  // namespace lmtfast::cpu
