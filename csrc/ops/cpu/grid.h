// SPDX-License-Identifier: MIT
// The positions of a stencil: which inputs an output sees through the taps, and which taps of which
// outputs see an input.
#pragma once

#include <cstdint>
#include <vector>

#include "lmtfast/lmtfast.h"
#include "ops/cpu/separable_kernels.h"

namespace lmtfast::cpu {

class Grid {
 public:
  explicit Grid(const lmtfast_op_row& row);

  int64_t inputs() const { return inputs_; }
  int64_t points() const { return static_cast<int64_t>(first_.size()); }

  // Windows (end - begin, width) of output points [begin, end): factor * h at the input that each
  // tap sees, zero outside, and zeros behind the taps. h is (inputs + 1, lanes), its last row zero.
  void gather(const float* h, int64_t lanes, float factor, int64_t begin, int64_t end,
              float* windows, int64_t width) const;

  // The adjoint: rows [begin, end) of h become the sums of what the taps hold of them in all
  // windows (points, width).
  void fold(const SeparableKernels& kernels, const float* windows, int64_t width, int64_t lanes,
            int64_t begin, int64_t end, float* h) const;

 private:
  struct Sight {
    int32_t point, tap;
  };
  // Sights of the inputs along one axis: those of input i from begin[i] on.
  struct Axis {
    std::vector<int32_t> begin;
    std::vector<Sight> sights;
    size_t most;  // sights of one input
    int64_t points, taps;
  };

  int64_t inputs_;
  std::vector<int32_t> source_;  // padded position to input; inputs_ where there is none
  std::vector<int32_t> first_;   // padded position of tap 0 at each output
  std::vector<int32_t> offset_;  // of each tap
  std::vector<Axis> axes_;
};

}  // namespace lmtfast::cpu
