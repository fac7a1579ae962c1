// SPDX-License-Identifier: MIT
// Index arithmetic of one operator, for kernels and for the host: where weights lie and what a tap
// reads. tests/csrc/test_cuda_stencil.cpp runs every function here on the CPU.
//
// Names: row o and channel c of group g, tap t, output position p, input position q; `column` is
// the place of (c, t) in a weight's row, in the order of its memory.
#pragma once

#include <cstdint>

#include "core/device_types.h"
#include "lmtfast/lmtfast.h"

namespace lmtfast::cuda {

using OpRow = lmtfast_op_row;
constexpr int kAxes = LMTFAST_OP_ROW_AXES;

LMTFAST_HD int64_t volume_of(const int64_t* extent) { return extent[0] * extent[1] * extent[2]; }

// Floor of a / b for b > 0.
LMTFAST_HD int32_t floor_divide(int32_t a, int32_t b) {
  const int32_t quotient = a / b;
  return quotient - (a % b < 0);
}

// What every index needs of a row, in 32 bits: extents of one operator fit (the host checks), and
// 64-bit divisions cost a device dozens of instructions.
struct Stencil {
  int32_t groups, rows, channels, taps, columns, phases;
  int32_t inputs, outputs;  // positions
  int32_t axes;
  bool circular, transposed;
  int32_t in[kAxes], out[kAxes], kernel[kAxes], stride[kAxes], pad[kAxes], dilation[kAxes];
};

LMTFAST_HD Stencil stencil_of(const OpRow& row) {
  Stencil s;
  s.groups = static_cast<int32_t>(row.groups);
  s.rows = static_cast<int32_t>(row.rows);
  s.channels = static_cast<int32_t>(row.channels);
  s.taps = static_cast<int32_t>(volume_of(row.kernel));
  s.columns = s.channels * s.taps;
  s.phases = static_cast<int32_t>(volume_of(row.stride));
  s.inputs = static_cast<int32_t>(volume_of(row.in));
  s.outputs = static_cast<int32_t>(volume_of(row.out));
  s.axes = static_cast<int32_t>(row.axes);
  s.circular = row.circular != 0;
  s.transposed = row.transposed != 0;
  for (int a = 0; a < kAxes; ++a) {
    s.in[a] = static_cast<int32_t>(row.in[a]);
    s.out[a] = static_cast<int32_t>(row.out[a]);
    s.kernel[a] = static_cast<int32_t>(row.kernel[a]);
    s.stride[a] = static_cast<int32_t>(row.stride[a]);
    s.pad[a] = static_cast<int32_t>(row.pad_low[a]);
    s.dilation[a] = static_cast<int32_t>(row.dilation[a]);
  }
  return s;
}

// Channel and tap of a weight's column.
struct Column {
  int32_t channel, tap;
};

LMTFAST_HD Column column_at(const Stencil& s, bool tap_major, int32_t column) {
  if (tap_major) return {column % s.channels, column / s.channels};
  return {column / s.taps, column % s.taps};
}

LMTFAST_HD int32_t column_of(const Stencil& s, bool tap_major, int32_t channel, int32_t tap) {
  return tap_major ? tap * s.channels + channel : channel * s.taps + tap;
}

// Coordinates of a flat index, the last axis fastest.
struct Point {
  int32_t at[kAxes];
};

LMTFAST_HD Point point_of(const int32_t* extent, int32_t index) {
  Point p;
  p.at[2] = index % extent[2];
  index /= extent[2];
  p.at[1] = index % extent[1];
  p.at[0] = index / extent[1];
  return p;
}

// Input position that output p reads at tap t, or -1 in the padding.
LMTFAST_HD int32_t input_of(const Stencil& s, const Point& p, const Point& t) {
  int32_t position = 0;
  for (int a = 0; a < kAxes; ++a) {
    int32_t i = s.stride[a] * p.at[a] + s.dilation[a] * t.at[a] - s.pad[a];
    if (s.circular) {
      // Padding wraps at most once.
      i += i < 0 ? s.in[a] : 0;
      i -= i >= s.in[a] ? s.in[a] : 0;
    }
    if (i < 0 || i >= s.in[a]) return -1;
    position = position * s.in[a] + i;
  }
  return position;
}

// Output position that reads the padded coordinate of input q, shifted by `wrap` periods per axis,
// at tap t; -1 if none does.
LMTFAST_HD int32_t output_of(const Stencil& s, const Point& q, const Point& t, const Point& wrap) {
  int32_t position = 0;
  for (int a = 0; a < kAxes; ++a) {
    const int32_t scaled = q.at[a] + wrap.at[a] * s.in[a] + s.pad[a] - s.dilation[a] * t.at[a];
    if (scaled < 0 || scaled % s.stride[a] != 0) return -1;
    const int32_t o = scaled / s.stride[a];
    if (o >= s.out[a]) return -1;
    position = position * s.out[a] + o;
  }
  return position;
}

// Wraps to look at: 27 combinations of -1, 0 and 1 where padding is circular, else only none.
LMTFAST_HD int32_t wraps_of(const Stencil& s) { return s.circular ? 27 : 1; }

LMTFAST_HD Point wrap_of(const Stencil& s, int32_t number) {
  if (!s.circular) return {{0, 0, 0}};
  return {{number / 9 - 1, number / 3 % 3 - 1, number % 3 - 1}};
}

// Centre tap of the identity, where channel c reaches row c of its group.
LMTFAST_HD int32_t centre_tap(const Stencil& s) {
  int32_t tap = 0;
  for (int a = 0; a < kAxes; ++a) tap = tap * s.kernel[a] + s.pad[a] / s.dilation[a];
  return tap;
}

// Offset of a tap in the exponent of the symbol, and the phase of the input that it reads
// (lmtfast/engines/polyphase.py). At stride 1 padding and dilation leave the symbol's norm alone.
LMTFAST_HD int32_t symbol_offset(const Stencil& s, int axis, int32_t tap) {
  if (s.stride[axis] == 1) return tap;
  return floor_divide(s.dilation[axis] * tap - s.pad[axis], s.stride[axis]);
}

LMTFAST_HD int32_t tap_phase(const Stencil& s, const Point& tap) {
  int32_t phase = 0;
  for (int a = 0; a < kAxes; ++a) {
    const int32_t reads = s.dilation[a] * tap.at[a] - s.pad[a];
    const int32_t offset = floor_divide(reads, s.stride[a]);
    phase = phase * s.stride[a] + (reads - offset * s.stride[a]);
  }
  return phase;
}

// Spread of an axis' offsets: the degree of the symbol in exp(-i w).
LMTFAST_HD int32_t symbol_degree(const Stencil& s, int axis) {
  return symbol_offset(s, axis, s.kernel[axis] - 1) - symbol_offset(s, axis, 0);
}

}  // namespace lmtfast::cuda
