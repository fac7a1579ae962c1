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

// A vector of positions per channel, scaled on the way in.
struct Planes {
  const float* data;  // (channels, positions) of the group
  int32_t channels, positions;
  const float* scale;  // per channel, or null
  float factor;

  __device__ float at(int32_t channel, int32_t position) const {
    const float x = data[static_cast<int64_t>(channel) * positions + position] * factor;
    return scale == nullptr ? x : x * scale[channel];
  }
};

struct ImageWeights {
  static constexpr bool kDepthFast = true;
  using Place = int32_t;
  const Op& op;
  TapDepth depth;

  __device__ Place place(int32_t row) const { return row < op.s.rows ? row : -1; }
  __device__ float at(Place row, int32_t step, int32_t lane) const {
    const int32_t c = depth.unit(step, lane);
    if (row < 0 || c >= op.s.channels) return 0.0f;
    const int32_t column = column_of(op.s, op.tap_major(), c, depth.tap(step, lane));
    return op.weight_at(op.first_weight() + static_cast<int64_t>(row) * op.s.columns + column);
  }
};

struct ImageInputs {
  static constexpr bool kDepthFast = false;
  struct Place {
    Point output;
    bool inside;
  };
  const Op& op;
  TapDepth depth;
  Planes input;

  __device__ Place place(int32_t output) const {
    return {point_of(op.s.out, output), output < op.s.outputs};
  }
  __device__ float at(const Place& p, int32_t step, int32_t lane) const {
    const int32_t c = depth.unit(step, lane);
    if (!p.inside || c >= op.s.channels) return 0.0f;
    const int32_t position = input_of(op.s, p.output, point_of(op.s.kernel, depth.tap(step, lane)));
    return position < 0 ? 0.0f : input.at(c, position);
  }
};

struct AdjointWeights {
  static constexpr bool kDepthFast = false;
  using Place = int32_t;
  const Op& op;
  TapDepth depth;

  __device__ Place place(int32_t channel) const { return channel < op.s.channels ? channel : -1; }
  __device__ float at(Place channel, int32_t step, int32_t lane) const {
    const int32_t o = depth.unit(step, lane);
    if (channel < 0 || o >= op.s.rows) return 0.0f;
    const int32_t column = column_of(op.s, op.tap_major(), channel, depth.tap(step, lane));
    return op.weight_at(op.first_weight() + static_cast<int64_t>(o) * op.s.columns + column);
  }
};

struct AdjointOutputs {
  static constexpr bool kDepthFast = false;
  struct Place {
    Point input;
    bool inside;
  };
  const Op& op;
  TapDepth depth;
  Planes output;

  __device__ Place place(int32_t input) const {
    return {point_of(op.s.in, input), input < op.s.inputs};
  }
  __device__ float at(const Place& q, int32_t step, int32_t lane) const {
    const int32_t o = depth.unit(step, lane);
    if (!q.inside || o >= op.s.rows) return 0.0f;
    const Point tap = point_of(op.s.kernel, depth.tap(step, lane));
    float sum = 0.0f;
    for (int32_t wrap = 0; wrap < wraps_of(op.s); ++wrap) {
      const int32_t position = output_of(op.s, q.input, tap, wrap_of(op.s, wrap));
      if (position >= 0) sum += output.at(o, position);
    }
    return sum;
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
