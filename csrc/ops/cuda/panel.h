// SPDX-License-Identifier: MIT
// Weights times panels of eight real columns, read where they lie, once per product: the bound is
// the bytes of the weights, at eight fused multiply-adds per weight.
#pragma once

#include "ops/cuda/view.h"

namespace lmtfast::cuda {

constexpr int kRowsPerWarp = kImageRows / (kBlockThreads / kWarpSize);
static_assert(kRowsPerWarp * kPanel == kWarpSize);
constexpr int kBackParts = kBlockThreads / kBackColumns;

struct alignas(16) Quad {
  float v[4];
};

struct PanelRow {
  float v[kPanel];
};

// Row of a panel; panels are 16-byte aligned.
__device__ inline PanelRow load_row(const float* panel, int64_t row) {
  LMTFAST_ALIGNED(panel, sizeof(Quad));
  const Quad* quads = reinterpret_cast<const Quad*>(panel + row * kPanel);
  const Quad a = quads[0], b = quads[1];
  return {{a.v[0], a.v[1], a.v[2], a.v[3], b.v[0], b.v[1], b.v[2], b.v[3]}};
}

// Sums values[i] over the warp; lane i gets the sum of number i. 31 shuffles for 32 sums: each step
// halves the numbers a lane still holds.
template <int kHalf>
__device__ float sum_scattered(float (&values)[kWarpSize]) {
  const bool upper = (Team<false>::rank() & kHalf) != 0;
  LMTFAST_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    const float mine = upper ? values[i + kHalf] : values[i];
    const float theirs = upper ? values[i] : values[i + kHalf];
    values[i] = mine + __shfl_xor_sync(kAllLanes, theirs, kHalf);
  }
  if constexpr (kHalf > 1) {
    return sum_scattered<kHalf / 2>(values);
  } else {
    return values[0];
  }
}

// Lane l gets the sum over `count` columns first, first + stride, ... of
//   weights[row l / 8][column] panel[position of the column][l % 8]
// for the warp's four rows, `left` of which exist.
template <class T>
__device__ float panel_image(const T* weights, int64_t row_stride, int left, int32_t first,
                             int32_t stride, int32_t count, const float* panel) {
  float sum[kWarpSize] = {};
  for (int32_t i = Team<false>::rank(); i < count; i += kWarpSize) {
    const PanelRow z = load_row(panel, i);
    const T* weight = weights + first + static_cast<int64_t>(i) * stride;
    LMTFAST_UNROLL
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const float w = r < left ? widen(weight[r * row_stride]) : 0.0f;
      LMTFAST_UNROLL
      for (int c = 0; c < kPanel; ++c) {
        sum[r * kPanel + c] = std::fma(w, z.v[c], sum[r * kPanel + c]);
      }
    }
  }
  return sum_scattered<kWarpSize / 2>(sum);
}

// sum[c] = sum over rows part, part + kBackParts, ... of weights[row][column] times that row of the
// panel (kPerTap: of the column's tap), with the row scale and a factor per column of the panel.
// Four rows at a time, so that their loads are under way together.
template <class T, bool kPerTap>
__device__ PanelRow panel_adjoint(const T* weights, const Op& op, int32_t column, int32_t part,
                                  const float* panel, const float* factor) {
  constexpr int kAhead = 4;
  PanelRow sum = {}, factors;
  LMTFAST_UNROLL
  for (int c = 0; c < kPanel; ++c) factors.v[c] = factor[c];
  const int32_t tap = column_at(op.s, op.tap_major(), column).tap;
  for (int32_t first = part; first < op.s.rows; first += kBackParts * kAhead) {
    float w[kAhead];
    LMTFAST_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int32_t o = first + i * kBackParts;
      w[i] = o < op.s.rows ? widen(weights[static_cast<int64_t>(o) * op.s.columns + column]) : 0.0f;
    }
    LMTFAST_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int32_t o = first + i * kBackParts;
      if (o >= op.s.rows) break;
      const float scale = op.rs(o);
      const PanelRow u = load_row(panel, kPerTap ? static_cast<int64_t>(o) * op.s.taps + tap : o);
      LMTFAST_UNROLL
      for (int c = 0; c < kPanel; ++c) {
        sum.v[c] = std::fma(w[i], u.v[c] * (factors.v[c] * scale), sum.v[c]);
      }
    }
  }
  return sum;
}

// Adds the parts of a column in order: result (kBackColumns, kPanel) in shared memory, for the
// whole block.
__device__ inline const float* combine_parts(const PanelRow& sum) {
  LMTFAST_SHARED(float, parts, [kBackParts][kBackColumns * kPanel]);
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % kBackColumns, part = thread / kBackColumns;
  LMTFAST_UNROLL
  for (int c = 0; c < kPanel; ++c) parts[part][column * kPanel + c] = sum.v[c];
  __syncthreads();
  for (int i = thread; i < kBackColumns * kPanel; i += kBlockThreads) {
    float total = parts[0][i];
    for (int p = 1; p < kBackParts; ++p) total += parts[p][i];
    parts[0][i] = total;
  }
  __syncthreads();
  return parts[0];
}

}  // namespace lmtfast::cuda
