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

// Blocks of the adjoint that a multiprocessor holds at once: enough loads in flight for its share of
// the memory's bandwidth.
constexpr int kBackBlocks = 4;

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
                                const float* factor) {
  if (has_bit(op.weight, kBfloat16Bit)) {
    return panel_adjoint<bfloat16, kPerTap>(
        address_of<const bfloat16>(op.weight) + op.first_weight(), op, column, part, panel, factor);
  }
  return panel_adjoint<float, kPerTap>(address_of<const float>(op.weight) + op.first_weight(), op,
                                       column, part, panel, factor);
}

// What makes column c of the image a unit vector; the separable image needs nothing.
__device__ float unit_factor(const View& v, const Op& op, int c) {
  const Method method = method_of(op);
  if (method == Method::kSeparable) return 1.0f;
  if (method == Method::kSymbol) return inverse_or_one(Symbol(v, op).length(c / 2));
  return c == 0 ? inverse_or_one(DenseStep(v, op).length()) : 0.0f;
}

// A tile of columns of the adjoint.
__global__ void __launch_bounds__(kBlockThreads, kBackBlocks) back_kernel(View v) {
  LMTFAST_SHARED(float, factors, [kPanel]);
  const Item item = v.items[blockIdx.x];
  const Op op(v, item.op, item.group);
  const Stencil& s = op.s;
  const OpWork& w = op.work;
  const int64_t group = item.group;
  const bool per_tap = method_of(op) == Method::kSeparable;
  const float* panel = per_tap ? v.floats + w.mixed + group * s.rows * s.taps * kPanel
                               : v.floats + w.image + group * s.rows * kPanel;
  if (threadIdx.x < kPanel) factors[threadIdx.x] = unit_factor(v, op, threadIdx.x);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t begin = item.tile * kBackColumns;
  const int32_t column = begin + thread % kBackColumns;
  PanelRow sum = {};
  if (column < s.columns) {
    const int32_t part = thread / kBackColumns;
    sum = per_tap ? back_column<true>(op, column, part, panel, factors)
                  : back_column<false>(op, column, part, panel, factors);
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

__device__ void move(const View& v, const Item& item) {
  const Op op(v, item.op, item.group);
  if (method_of(op) == Method::kSymbol) {
    finish_symbol(v, op);
  } else if (method_of(op) == Method::kSeparable) {
    finish_separable(v, op);
  } else {
    finish_matrix(v, op, item.op);
  }
}

// The first blocks record what the gradient needs, one per operator; the others go on to the new
// iterates, one per group.
__global__ void __launch_bounds__(kBlockThreads, 1) end_kernel(View v, unsigned records) {
  const Item item = v.items[blockIdx.x];
  if (blockIdx.x < records) {
    record(v, item);
  } else {
    move(v, item);
  }
}

__global__ void __launch_bounds__(kBlockThreads, 1) grid_kernel(View v) {
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

void launch_back(const View& view, unsigned blocks, Stream stream) {
  LMTFAST_LAUNCH(back_kernel, blocks, kBlockThreads, 0, stream, view);
}

void launch_end(const View& view, unsigned records, unsigned groups, Stream stream) {
  LMTFAST_LAUNCH(end_kernel, records + groups, kBlockThreads, 0, stream, view, records);
}

}  // namespace lmtfast::cuda
