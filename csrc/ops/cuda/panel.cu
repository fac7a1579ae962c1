// SPDX-License-Identifier: MIT
// The launches of the methods that read the weights as panels: symbol, separable, matrix. Floor of a
// step: the weights once per product from memory or L2, 4 or 2 bytes each.
#include <cmath>

#include "ops/cuda/matrix.h"
#include "ops/cuda/separable.h"
#include "ops/cuda/spectral.h"
#include "ops/cuda/symbol.h"

namespace lmtfast::cuda {
namespace {

__device__ Method method_of(const Op& op) { return static_cast<Method>(op.work.method); }

// A warp's share of the image: panel_image of rows first.. with `left` of them, for one tap or all.
template <class T>
__device__ float image_rows(const Op& op, int32_t first, int left, int32_t tap,
                            const float* panel) {
  const Stencil& s = op.s;
  const T* weights =
      address_of<const T>(op.weight) + op.first_weight() + static_cast<int64_t>(first) * s.columns;
  if (tap < 0) return panel_image(weights, s.columns, left, 0, 1, s.columns, panel);
  const bool tap_major = op.tap_major();
  return panel_image(weights, s.columns, left, column_of(s, tap_major, 0, tap),
                     tap_major ? 1 : s.taps, s.channels, panel);
}

__device__ float image_rows(const Op& op, int32_t first, int left, int32_t tap,
                            const float* panel) {
  return has_bit(op.weight, kBfloat16Bit) ? image_rows<bfloat16>(op, first, left, tap, panel)
                                          : image_rows<float>(op, first, left, tap, panel);
}

__global__ void __launch_bounds__(kBlockThreads) image_kernel(View v) {
  LMTFAST_SHARED(double, part, [kBlockThreads / kWarpSize][kPanel]);
  const Item item = v.items[blockIdx.x];
  const Op op(v, item.op, item.group);
  const Stencil& s = op.s;
  const OpWork& w = op.work;
  const int lane = Team<false>::rank(), warp = Team<false>::number();
  const int32_t first = item.tile * kImageRows + warp * kRowsPerWarp;
  const int left = s.rows - first;
  const int32_t o = first + lane / kPanel;
  const int c = lane % kPanel;
  const float identity = op.identity();
  const int64_t group = item.group;
  if (method_of(op) == Method::kSeparable) {
    if (left <= 0) return;
    const float* panel = v.floats + w.panel + group * s.channels * kPanel;
    const float* plain = v.floats + w.plain + group * s.channels * kPanel;
    for (int32_t tap = 0; tap < s.taps; ++tap) {
      float value = image_rows(op, first, left, tap, panel);
      if (o >= s.rows) continue;
      value *= op.rs(o);
      if (identity != 0.0f && o < s.channels && tap == centre_tap(s)) {
        value += identity * plain[o * kPanel + c];
      }
      v.floats[w.image + ((group * s.rows + o) * s.taps + tap) * kPanel + c] = value;
    }
    return;
  }
  const float* panel = v.floats + w.panel + group * s.columns * kPanel;
  const float pure = left > 0 ? image_rows(op, first, left, -1, panel) : 0.0f;
  float value = 0.0f;
  if (o < s.rows) {
    value = pure * op.rs(o);
    if (identity != 0.0f && o < s.channels) {
      if (method_of(op) == Method::kSymbol) {
        value += identity * symbol_identity(Symbol(v, op), o, c);
      } else if (c == 0) {
        value += identity * v.floats[w.plain + o];
      }
    }
    const int64_t at = (group * s.rows + o) * kPanel + c;
    v.floats[w.pure + at] = pure;
    v.floats[w.image + at] = value;
  }
  double square = static_cast<double>(value) * static_cast<double>(value);
  for (int bits = kPanel; bits < kWarpSize; bits *= 2) {
    square += __shfl_xor_sync(kAllLanes, square, bits);
  }
  if (lane < kPanel) part[warp][lane] = square;
  __syncthreads();
  if (threadIdx.x < kPanel) {
    double total = 0;
    for (int i = 0; i < kBlockThreads / kWarpSize; ++i) total += part[i][threadIdx.x];
    v.doubles[w.norms + (group * item.tiles + item.tile) * kPanel + threadIdx.x] = total;
  }
}

template <bool kPerTap>
__device__ PanelRow back_column(const Op& op, int32_t column, int32_t part, const float* panel,
                                const float (&factor)[kPanel]) {
  if (has_bit(op.weight, kBfloat16Bit)) {
    return panel_adjoint<bfloat16, kPerTap>(
        address_of<const bfloat16>(op.weight) + op.first_weight(), op, column, part, panel, factor);
  }
  return panel_adjoint<float, kPerTap>(address_of<const float>(op.weight) + op.first_weight(), op,
                                       column, part, panel, factor);
}

// Factors that make the image's columns unit vectors; the separable image needs none.
__device__ void unit_factors(const View& v, const Op& op, float (&factor)[kPanel]) {
  const Method method = method_of(op);
  LMTFAST_UNROLL
  for (int f = 0; f < kCandidates; ++f) {
    float inverse = method == Method::kMatrix ? 0.0f : 1.0f;
    if (method == Method::kSymbol) inverse = inverse_or_one(Symbol(v, op).length(f));
    if (method == Method::kMatrix && f == 0) inverse = inverse_or_one(DenseStep(v, op).length());
    factor[2 * f] = inverse;
    factor[2 * f + 1] = method == Method::kMatrix ? 0.0f : inverse;
  }
}

// A tile of columns; the last tile of a group to finish goes on to the new iterate.
__device__ void back_tile(const View& v, const Item& item) {
  LMTFAST_SHARED(float, factors, [kPanel]);
  LMTFAST_SHARED(int, last, [1]);
  const Op op(v, item.op, item.group);
  const Stencil& s = op.s;
  const OpWork& w = op.work;
  const int64_t group = item.group;
  const bool per_tap = method_of(op) == Method::kSeparable;
  const float* panel = per_tap ? v.floats + w.mixed + group * s.rows * s.taps * kPanel
                               : v.floats + w.image + group * s.rows * kPanel;
  float factor[kPanel];
  unit_factors(v, op, factor);
  if (threadIdx.x == 0) {
    LMTFAST_UNROLL
    for (int c = 0; c < kPanel; ++c) factors[c] = factor[c];
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t begin = item.tile * kBackColumns;
  const int32_t column = begin + thread % kBackColumns;
  PanelRow sum = {};
  if (column < s.columns) {
    const int32_t part = thread / kBackColumns;
    sum = per_tap ? back_column<true>(op, column, part, panel, factor)
                  : back_column<false>(op, column, part, panel, factor);
  }
  const float* total = combine_parts(sum);
  const float identity = op.identity();
  for (int i = thread; i < kBackColumns * kPanel; i += kBlockThreads) {
    const int32_t j = begin + i / kPanel;
    const int c = i % kPanel;
    if (j >= s.columns) continue;
    const Column at = column_at(s, op.tap_major(), j);
    float value = total[i] * op.cs(at.channel);
    if (identity != 0.0f && at.tap == centre_tap(s) && at.channel < s.rows) {
      const int64_t from =
          per_tap ? static_cast<int64_t>(at.channel) * s.taps + at.tap : at.channel;
      value += identity * (panel[from * kPanel + c] * factors[c]);
    }
    v.floats[w.back + (group * s.columns + j) * kPanel + c] = value;
  }
  // What this block wrote is seen by the one that counts it last.
  __threadfence();
  __syncthreads();
  if (thread == 0) last[0] = atomicAdd(v.integers + w.ticket + group, 1) == item.tiles - 1;
  __syncthreads();
  if (last[0] == 0) return;
  __threadfence();
  if (method_of(op) == Method::kSymbol) {
    finish_symbol(v, op);
  } else if (method_of(op) == Method::kSeparable) {
    finish_separable(v, op);
  } else {
    finish_matrix(v, op, item.op);
  }
}

__device__ void record(const View& v, const Item& item) {
  const auto method = static_cast<Method>(v.work[item.op].method);
  if (method == Method::kSymbol) {
    record_symbol(v, item.op);
  } else if (method == Method::kSeparable) {
    record_separable(v, item.op);
  } else {
    record_matrix(v, item.op);
  }
}

// Blocks from `tiles` on record what the gradient needs, one per operator.
__global__ void __launch_bounds__(kBlockThreads) back_kernel(View v, unsigned tiles) {
  const Item item = v.items[blockIdx.x];
  if (blockIdx.x < tiles) {
    back_tile(v, item);
  } else {
    record(v, item);
  }
}

__global__ void __launch_bounds__(kBlockThreads) record_kernel(View v) {
  record(v, v.items[blockIdx.x]);
}

__global__ void __launch_bounds__(kBlockThreads) grid_kernel(View v) {
  const Item item = v.items[blockIdx.x];
  grid_step(v, Op(v, item.op, item.group));
}

}  // namespace

void launch_image(const View& view, unsigned blocks, Stream stream) {
  LMTFAST_LAUNCH(image_kernel, blocks, kBlockThreads, 0, stream, view);
}

void launch_grid(const View& view, unsigned blocks, Stream stream) {
  LMTFAST_LAUNCH(grid_kernel, blocks, kBlockThreads, 0, stream, view);
}

void launch_back(const View& view, unsigned tiles, unsigned records, Stream stream) {
  if (tiles == 0) {
    LMTFAST_LAUNCH(record_kernel, records, kBlockThreads, 0, stream, view);
  } else {
    LMTFAST_LAUNCH(back_kernel, tiles + records, kBlockThreads, 0, stream, view, tiles);
  }
}

}  // namespace lmtfast::cuda
