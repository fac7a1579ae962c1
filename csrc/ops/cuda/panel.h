// SPDX-License-Identifier: MIT
// Weights times panels of eight real columns, tap by tap, read where they lie, once per product: the
// bound is the bytes of the weights, at eight fused multiply-adds per weight.
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

// Lane l gets the sum over `count` columns from `first` of
//   weights[row l / 8][column] panel[column - first][l % 8]
// for the warp's four rows, `left` of which exist.
template <class T>
__device__ float panel_image(const T* weights, int64_t row_stride, int left, int32_t first,
                             int32_t count, const float* panel) {
  float sum[kWarpSize] = {};
  for (int32_t i = Team<false>::rank(); i < count; i += kWarpSize) {
    const PanelRow z = load_row(panel, i);
    const T* weight = weights + first + i;
    LMTFAST_UNROLL
    for (int r = 0; r < kRowsPerWarp; ++r) {
      const float w = r < left ? widen(weight[r * row_stride]) : 0.0f;
      LMTFAST_UNROLL
      for (int c = 0; c < kPanel; ++c) {
        sum[r * kPanel + c] = std::fma(w, z.v[c], sum[r * kPanel + c]);
      }
    }
  }
  return scattered_sum<kWarpSize / 2>(sum);
}

// The same where the taps of a channel are neighbours in memory: lanes walk it as it lies, and as many
// of them as make whole channels keep to one tap each. Taps first, first + 1, ... up to a warp of
// them; sum[8 r + c] becomes that of row r and panel column c, in the lane of the tap.
template <class T>
__device__ void panel_image_of_taps(const T* weights, const Stencil& s, int left, int32_t first,
                                    const float* panel, float (&sum)[kWarpSize]) {
  constexpr int kAhead = 4;
  const int32_t lane = Team<false>::rank();
  const int32_t taps = s.taps < kWarpSize ? s.taps : kWarpSize, group = kWarpSize / taps;
  const int32_t tap = first + lane % taps;
  const bool used = lane < group * taps && tap < s.taps;
  LMTFAST_UNROLL
  for (float& x : sum) x = 0.0f;
  for (int32_t begin = used ? lane / taps : s.channels; begin < s.channels;
       begin += group * kAhead) {
    float w[kAhead][kRowsPerWarp];
    LMTFAST_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int32_t channel = begin + i * group;
      LMTFAST_UNROLL
      for (int r = 0; r < kRowsPerWarp; ++r) {
        const int64_t at = static_cast<int64_t>(r) * s.columns + channel * s.taps + tap;
        w[i][r] = channel < s.channels && r < left ? widen(weights[at]) : 0.0f;
      }
    }
    LMTFAST_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int32_t channel = begin + i * group;
      if (channel >= s.channels) break;
      const PanelRow z = load_row(panel, channel);
      LMTFAST_UNROLL
      for (int r = 0; r < kRowsPerWarp; ++r) {
        LMTFAST_UNROLL
        for (int c = 0; c < kPanel; ++c) {
          sum[r * kPanel + c] = std::fma(w[i][r], z.v[c], sum[r * kPanel + c]);
        }
      }
    }
  }
  LMTFAST_UNROLL
  for (float& x : sum) {
    const float part = x;
    for (int32_t i = 1; i < group; ++i) {
      x += __shfl_sync(kAllLanes, part, (lane + i * taps) % kWarpSize);
    }
  }
}

// sum[c] = sum over rows part, part + kBackParts, ... of weights[row][column] times that row and the
// column's tap of the panel, with the row scale. So many rows at a time that their loads are under
// way together.
template <class T>
__device__ PanelRow panel_adjoint(const T* weights, const Op& op, int32_t column, int32_t part,
                                  const float* panel) {
  constexpr int kAhead = 16;
  PanelRow sum = {};
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
      const PanelRow u = load_row(panel, static_cast<int64_t>(o) * op.s.taps + tap);
      LMTFAST_UNROLL
      for (int c = 0; c < kPanel; ++c) sum.v[c] = std::fma(w[i] * scale, u.v[c], sum.v[c]);
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
