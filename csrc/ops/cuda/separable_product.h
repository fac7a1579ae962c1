// SPDX-License-Identifier: MIT
// One block's share of the separable engine's two products with the weights. The second needs what
// the grid makes of all rows of the first (lmtfast/engines/separable.py: the new pattern comes from
// the Gram matrix of the whole image, the new channel vector from the new pattern), so the weights are
// read twice. Floor: their bytes, once per product from memory or L2.
#pragma once

#include "ops/cuda/separable.h"

namespace lmtfast::cuda {

// Entry (o, tap, c) of the image, from its sum over the channels.
__device__ inline void write_image(const View& v, const Op& op, int32_t o, int32_t tap, int c,
                                   float sum) {
  const Stencil& s = op.s;
  const int64_t group = op.group;
  float value = sum * op.rs(o);
  if (op.identity() != 0.0f && o < s.channels && tap == centre_tap(s)) {
    value += op.identity() * v.floats[op.work.plain + (group * s.channels + o) * kPanel + c];
  }
  v.floats[op.work.image + ((group * s.rows + o) * s.taps + tap) * kPanel + c] = value;
}

// A warp's four rows of the image, `left` of which exist.
template <class T>
__device__ void image_rows(const View& v, const Op& op, int32_t first, int left) {
  const Stencil& s = op.s;
  const int lane = Team<false>::rank();
  const float* panel =
      v.floats + op.work.panel + static_cast<int64_t>(op.group) * s.channels * kPanel;
  const T* weights =
      address_of<const T>(op.weight) + op.first_weight() + static_cast<int64_t>(first) * s.columns;
  if (op.tap_major() || s.taps == 1) {
    // Channels are neighbours.
    for (int32_t tap = 0; tap < s.taps; ++tap) {
      const float sum = panel_image(weights, s.columns, left, tap * s.channels, s.channels, panel);
      if (lane / kPanel < left) write_image(v, op, first + lane / kPanel, tap, lane % kPanel, sum);
    }
    return;
  }
  for (int32_t tap = 0; tap < s.taps; tap += kWarpSize) {
    float sum[kWarpSize];
    panel_image_of_taps(weights, s, left, tap, panel, sum);
    if (tap + lane >= s.taps) continue;
    LMTFAST_UNROLL
    for (int i = 0; i < kWarpSize; ++i) {
      if (i / kPanel < left) write_image(v, op, first + i / kPanel, tap + lane, i % kPanel, sum[i]);
    }
  }
}

// A tile of rows of the image; the last block of a group goes on to the grid.
__device__ inline void panel_image_tile(const View& v, const Op& op, const Item& item) {
  const int32_t first = item.tile * kImageRows + Team<false>::number() * kRowsPerWarp;
  const int left = op.s.rows - first;
  if (left > 0) {
    if (has_bit(op.weight, kBfloat16Bit)) {
      image_rows<bfloat16>(v, op, first, left);
    } else {
      image_rows<float>(v, op, first, left);
    }
  }
  if (last_of(v.counters + op.work.counters + item.group, item.tiles)) grid_step(v, op);
}

__device__ inline PanelRow back_column(const Op& op, int32_t column, int32_t part,
                                       const float* panel) {
  if (has_bit(op.weight, kBfloat16Bit)) {
    return panel_adjoint(address_of<const bfloat16>(op.weight) + op.first_weight(), op, column,
                         part, panel);
  }
  return panel_adjoint(address_of<const float>(op.weight) + op.first_weight(), op, column, part,
                       panel);
}

// A tile of columns of the adjoint; the last block of a group goes on to the new iterate.
__device__ inline void panel_back_tile(const View& v, const Op& op, const Item& item) {
  const Stencil& s = op.s;
  const OpWork& w = op.work;
  const int64_t group = item.group;
  const float* panel = v.floats + w.mixed + group * s.rows * s.taps * kPanel;
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t begin = item.tile * kBackColumns;
  const int32_t column = begin + thread % kBackColumns;
  PanelRow sum = {};
  if (column < s.columns) sum = back_column(op, column, thread / kBackColumns, panel);
  const float* total = combine_parts(sum);
  const float identity = op.identity();
  for (int i = thread; i < kBackColumns * kPanel; i += kBlockThreads) {
    const int32_t j = begin + i / kPanel;
    const int c = i % kPanel;
    if (j >= s.columns) continue;
    const Column at = column_at(s, op.tap_major(), j);
    float value = total[i] * op.cs(at.channel);
    if (identity != 0.0f && at.tap == centre_tap(s) && at.channel < s.rows) {
      value += identity * panel[(static_cast<int64_t>(at.channel) * s.taps + at.tap) * kPanel + c];
    }
    v.floats[w.back + (group * s.columns + j) * kPanel + c] = value;
  }
  if (last_of(v.counters + w.counters + s.groups + group, item.tiles)) finish_separable(v, op);
}

}  // namespace lmtfast::cuda
