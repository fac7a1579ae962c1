// SPDX-License-Identifier: MIT
// Where a stencil reads: the padded input, split into the phases of the stride.
//
// Output o reads padded input y = stride * o + dilation * t at tap t, per axis. With the padded
// input stored phase by phase (y mod stride outside, y div stride inside), tap t of every output
// lies at one fixed offset from the output's own place:  plane[tap_offset[t] + place(o)],
// place(o) = (o0 * pitch0 + o1) * pitch1 + o2. So padding, stride, dilation and wrapping around are
// settled once when the plane is filled, and products see runs of consecutive numbers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ops/spectral.h"

namespace lmtfast::cpu {

// The input index that a padded coordinate reads, -1 in the padding.
inline int64_t input_index(const lmtfast_op_row& row, int axis, int64_t padded) {
  const int64_t i = padded - row.pad_low[axis], n = row.in[axis];
  if (row.circular) return (i % n + n) % n;
  return i >= 0 && i < n ? i : -1;
}

// One axis of the plane: `extent` places of each phase that some tap reads. Place e of phase f is
// the padded coordinate stride * e + phase[f].
struct StencilAxis {
  // Places [begin, begin + length) read inputs first, first + stride, ...; the others, zeros.
  struct Segment {
    int64_t begin = 0, length = 0, first = 0;
  };
  int64_t extent = 1;
  std::vector<int64_t> phase;
  std::vector<int64_t> input;    // (phases, extent): input index, or -1
  std::vector<Segment> segment;  // (phases); unless the axis is circular

  StencilAxis(const lmtfast_op_row& row, int axis) {
    const int64_t stride = row.stride[axis];
    const int64_t reach =
        stride * (row.out[axis] - 1) + row.dilation[axis] * (row.kernel[axis] - 1) + 1;
    extent = (reach + stride - 1) / stride;
    for (int64_t t = 0; t < row.kernel[axis]; ++t) {
      const int64_t f = row.dilation[axis] * t % stride;
      if (std::find(phase.begin(), phase.end(), f) == phase.end()) phase.push_back(f);
    }
    for (const int64_t f : phase) {
      Segment inside;
      for (int64_t e = 0; e < extent; ++e) {
        const int64_t padded = stride * e + f;
        input.push_back(padded < reach ? input_index(row, axis, padded) : -1);
        if (input.back() < 0) continue;
        if (inside.length++ == 0) inside.begin = e, inside.first = input.back();
      }
      segment.push_back(inside);
    }
  }

  int64_t phases() const { return static_cast<int64_t>(phase.size()); }
  int64_t phase_of(const lmtfast_op_row& row, int axis, int64_t t) const {
    const int64_t f = row.dilation[axis] * t % row.stride[axis];
    return std::find(phase.begin(), phase.end(), f) - phase.begin();
  }
};

struct Stencil {
  StencilAxis axis[LMTFAST_OP_ROW_AXES];
  int64_t plane;                    // entries of one channel
  int64_t points;                   // outputs
  bool plain;                       // the plane is the input itself
  std::vector<int64_t> tap_offset;  // (taps)

  explicit Stencil(const lmtfast_op_row& row)
      : axis{{row, 0}, {row, 1}, {row, 2}}, plane(1), points(volume(row.out)) {
    for (const StencilAxis& a : axis) plane *= a.phases() * a.extent;
    const int64_t inner = axis[0].extent * axis[1].extent * axis[2].extent;
    for (int64_t t = 0; t < taps(row); ++t) {
      const int64_t at[] = {t / (row.kernel[1] * row.kernel[2]), t / row.kernel[2] % row.kernel[1],
                            t % row.kernel[2]};
      int64_t phase = 0, place = 0;
      for (int a = 0; a < LMTFAST_OP_ROW_AXES; ++a) {
        phase = phase * axis[a].phases() + axis[a].phase_of(row, a, at[a]);
        place = place * axis[a].extent + row.dilation[a] * at[a] / row.stride[a];
      }
      tap_offset.push_back(phase * inner + place);
    }
    plain = taps(row) == 1 && plane == volume(row.in) && plane == points;
    for (int a = 0; a < LMTFAST_OP_ROW_AXES; ++a) plain = plain && row.pad_low[a] == 0;
  }
};

// Consecutive places of consecutive outputs, at most `width` long.
struct Run {
  int64_t lane;   // first output, counted from the start of the range
  int64_t place;  // its place
  int64_t length;
};

// Appends the runs of outputs [begin, begin + count) to `runs` (room for `count`); returns how many.
inline int64_t find_runs(const lmtfast_op_row& row, const Stencil& stencil, int64_t begin,
                         int64_t count, int64_t width, Run* runs) {
  const int64_t line = row.out[2];
  int64_t found = 0, o = begin;
  while (o < begin + count) {
    const int64_t x = o % line, y = o / line % row.out[1], z = o / line / row.out[1];
    const int64_t place = (z * stencil.axis[1].extent + y) * stencil.axis[2].extent + x;
    int64_t length = std::min(line - x, begin + count - o), used = 0;
    // Where lines touch, a run goes on.
    if (found > 0 && runs[found - 1].place + runs[found - 1].length == place) {
      used = std::min(length, width - runs[found - 1].length);
      runs[found - 1].length += used;
    }
    for (; used < length; ++found) {
      const int64_t part = std::min(length - used, width);
      runs[found] = {o - begin + used, place + used, part};
      used += part;
    }
    o += length;
  }
  return found;
}

// Output-side place of the centre tap of the identity: the input position that output o maps to
// itself, -1 in the padding. For every output; empty without an identity.
inline std::vector<int64_t> identity_positions(const lmtfast_op_row& row) {
  std::vector<int64_t> positions;
  if (row.identity == 0.0) return positions;
  positions.reserve(static_cast<size_t>(volume(row.out)));
  for (int64_t z = 0; z < row.out[0]; ++z) {
    for (int64_t y = 0; y < row.out[1]; ++y) {
      for (int64_t x = 0; x < row.out[2]; ++x) {
        const int64_t o[] = {z, y, x};
        int64_t position = 0;
        for (int a = 0; a < LMTFAST_OP_ROW_AXES; ++a) {
          const int64_t centre = row.pad_low[a] / row.dilation[a] * row.dilation[a];
          const int64_t i = input_index(row, a, row.stride[a] * o[a] + centre);
          position = position < 0 || i < 0 ? -1 : position * row.in[a] + i;
        }
        positions.push_back(position);
      }
    }
  }
  return positions;
}

}  // namespace lmtfast::cpu
