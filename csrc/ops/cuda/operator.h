// SPDX-License-Identifier: MIT
// The three products of a stencil as operands of tile products (tile.h):
//   image     (rows, outputs)   = W (rows, columns)      x inputs read by (column, output)
//   adjoint   (channels, inputs) = W^T (channels, rows taps) x outputs that read (tap, input)
//   gradient  (rows, columns)   = image (rows, outputs)  x inputs read by (output, column)
// With 16 channels (rows) or more, a step is 16 of them at one tap: what a tap reads is worked out
// once per step, and its weights stay in L1 for the taps that follow.
#pragma once

#include "ops/cuda/tile.h"

namespace lmtfast::cuda {

// Walks (unit, tap): units are channels or rows.
struct TapDepth {
  int32_t units, taps;
  bool wide;

  __device__ TapDepth(int32_t units_, int32_t taps_)
      : units(units_), taps(taps_), wide(units_ >= kTileStep) {}
  __device__ int32_t steps() const {
    return wide ? steps_of(units) * taps : steps_of(static_cast<int64_t>(units) * taps);
  }
  __device__ int32_t tap(int32_t step, int32_t lane) const {
    return wide ? step % taps : (step * kTileStep + lane) % taps;
  }
  // Beyond the last: a number of units or more.
  __device__ int32_t unit(int32_t step, int32_t lane) const {
    return wide ? step / taps * kTileStep + lane : (step * kTileStep + lane) / taps;
  }
};

// A vector of positions per unit, scaled on the way in.
struct Planes {
  const float* data;  // (units, positions) of the group
  int32_t positions;
  const float* scale;  // per unit, or null
  float factor;

  __device__ float at(int32_t unit, int32_t position) const {
    const float x = data[static_cast<int64_t>(unit) * positions + position] * factor;
    return scale == nullptr ? x : x * scale[unit];
  }
  // What a tap of the stencil sees from an output, of the adjoint from an input.
  template <bool kAdjoint>
  __device__ float seen(const Stencil& s, int32_t unit, const Point& from, const Point& tap) const {
    if constexpr (kAdjoint) {
      float sum = 0.0f;
      for (int32_t wrap = 0; wrap < wraps_of(s); ++wrap) {
        const int32_t position = output_of(s, from, tap, wrap_of(s, wrap));
        if (position >= 0) sum += at(unit, position);
      }
      return sum;
    } else {
      const int32_t position = input_of(s, from, tap);
      return position < 0 ? 0.0f : at(unit, position);
    }
  }
};

// W, of the adjoint W^T: a place is a row (a channel), a unit a channel (a row).
template <bool kAdjoint>
struct ProductWeights {
  static constexpr bool kDepthFast = !kAdjoint;
  using Place = int32_t;
  const Op& op;
  TapDepth depth;

  __device__ Place place(int32_t i) const {
    return i < (kAdjoint ? op.s.channels : op.s.rows) ? i : -1;
  }
  __device__ float at(Place i, int32_t step, int32_t lane) const {
    const int32_t unit = depth.unit(step, lane);
    if (i < 0 || unit >= depth.units) return 0.0f;
    const int32_t row = kAdjoint ? unit : i, channel = kAdjoint ? i : unit;
    const int32_t column = column_of(op.s, op.tap_major(), channel, depth.tap(step, lane));
    return op.weight_at(op.first_weight() + static_cast<int64_t>(row) * op.s.columns + column);
  }
};

template <bool kAdjoint>
struct ProductPlanes {
  static constexpr bool kDepthFast = false;
  struct Place {
    Point from;
    bool inside;
  };
  const Op& op;
  TapDepth depth;
  Planes read;

  __device__ Place place(int32_t position) const {
    return {point_of(kAdjoint ? op.s.in : op.s.out, position),
            position < (kAdjoint ? op.s.inputs : op.s.outputs)};
  }
  __device__ float at(const Place& p, int32_t step, int32_t lane) const {
    const int32_t unit = depth.unit(step, lane);
    if (!p.inside || unit >= depth.units) return 0.0f;
    const Point tap = point_of(op.s.kernel, depth.tap(step, lane));
    return read.seen<kAdjoint>(op.s, unit, p.from, tap);
  }
};

struct GradientRows {
  static constexpr bool kDepthFast = true;
  using Place = int32_t;
  const Op& op;
  const float* image;  // (rows, outputs) of the group

  __device__ Place place(int32_t row) const { return row < op.s.rows ? row : -1; }
  __device__ float at(Place row, int32_t step, int32_t lane) const {
    const int32_t p = step * kTileStep + lane;
    if (row < 0 || p >= op.s.outputs) return 0.0f;
    return image[static_cast<int64_t>(row) * op.s.outputs + p];
  }
};

struct GradientInputs {
  static constexpr bool kDepthFast = true;
  struct Place {
    int32_t channel;
    Point tap;
    bool inside;
  };
  const Op& op;
  const float* input;  // (channels, inputs) of the group

  __device__ Place place(int32_t column) const {
    const Column at = column_at(op.s, op.tap_major(), column);
    return {at.channel, point_of(op.s.kernel, at.tap), column < op.s.columns};
  }
  __device__ float at(const Place& column, int32_t step, int32_t lane) const {
    const int32_t p = step * kTileStep + lane;
    if (!column.inside || p >= op.s.outputs) return 0.0f;
    const int32_t position = input_of(op.s, point_of(op.s.out, p), column.tap);
    return position < 0 ? 0.0f
                        : input[static_cast<int64_t>(column.channel) * op.s.inputs + position];
  }
};

}  // namespace lmtfast::cuda
