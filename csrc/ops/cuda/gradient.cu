// SPDX-License-Identifier: MIT
// Gradients of the norms in the weights and in their channel scales. Floor: one write of every
// gradient, and for the power iteration one multiply-add per weight and output position.
#include <cmath>

#include "ops/cuda/scales.h"
#include "ops/cuda/separable.h"
#include "ops/cuda/spectral.h"

namespace lmtfast::cuda {
namespace {

// Vectors that a step saved (csrc/ops/spectral.h).
__device__ bool loses(const View& v, const Op& op) {
  const auto method = static_cast<Method>(op.work.method);
  if (method == Method::kStencil || method == Method::kMatrix) return false;
  return static_cast<int32_t>(v.saved[op.row.saved_offset]) != op.group;
}

// Gradient of sigma in the acting kernel at one entry, for the methods that have it at hand.
__device__ float panel_gradient(const View& v, const Op& op, int32_t o, int32_t column) {
  const Stencil& s = op.s;
  const float* saved = v.saved + op.row.saved_offset;
  const Column at = column_at(s, op.tap_major(), column);
  const auto method = static_cast<Method>(op.work.method);
  if (method == Method::kSymbol) {
    const float* u = saved + 1 + 2 * o;
    const float* z = saved + 1 + 2 * s.rows + 2 * column_of(s, false, at.channel, at.tap);
    return std::fma(u[0], z[0], u[1] * z[1]);
  }
  if (method == Method::kMatrix) return saved[o] * saved[s.rows + column];
  const int32_t rank = static_cast<int32_t>(op.row.rank);
  const float* y = v.floats + op.work.mixed + (static_cast<int64_t>(o) * s.taps + at.tap) * kPanel;
  const float* a = saved + 2 + static_cast<int64_t>(s.inputs + at.channel) * rank;
  float sum = 0.0f;
  for (int k = 0; k < rank; ++k) sum = std::fma(y[k], a[k], sum);
  return sum;
}

// The same for a tile; zero beyond its edges.
__device__ void acting_gradient(const View& v, const Op& op, int32_t row0, int32_t column0,
                                TileSum& gradient) {
  const Stencil& s = op.s;
  if (static_cast<Method>(op.work.method) == Method::kStencil) {
    const int64_t outside = static_cast<int64_t>(s.rows) * s.outputs;
    const int64_t inside = static_cast<int64_t>(s.channels) * s.inputs;
    // u, then v; in a transposed convolution u is on the stencil's input side.
    const float* first = v.saved + op.row.saved_offset;
    const float* second = first + s.groups * (s.transposed ? inside : outside);
    const float* image = (s.transposed ? second : first) + op.group * outside;
    const float* input = (s.transposed ? first : second) + op.group * inside;
    tile_product(GradientRows{op, image}, GradientInputs{op, input}, s.rows, s.columns, row0,
                 column0, steps_of(s.outputs), gradient);
    return;
  }
  const bool lost = loses(v, op);
  LMTFAST_UNROLL
  for (int a = 0; a < kTilePer; ++a) {
    LMTFAST_UNROLL
    for (int b = 0; b < kTilePer; ++b) {
      const int32_t o = row0 + tile_row(a), column = column0 + tile_column(b);
      const bool inside = !lost && o < s.rows && column < s.columns;
      gradient[a][b] = inside ? panel_gradient(v, op, o, column) : 0.0f;
    }
  }
}

// Sums of the tile's rows and columns, for the gradients of the scales, into this block's places.
__device__ void write_sums(const View& v, const Op& op, const Item& item, int32_t row0,
                           int32_t column0, float grad, const SharedTile& tile) {
  const Stencil& s = op.s;
  const int32_t column_tiles = tiles_of(s.columns);
  const int64_t group = item.group;
  // A thread has a row or a column of the tile; both are short.
  const int32_t i = static_cast<int32_t>(threadIdx.x) % kTileSide;
  const bool by_row = threadIdx.x < kTileSide;
  if (threadIdx.x >= 2 * kTileSide) return;
  if (by_row ? op.row_scale == nullptr : op.column_scale == nullptr) return;
  double total = 0;
  for (int32_t j = 0; j < kTileSide; ++j) {
    const int32_t o = row0 + (by_row ? i : j), column = column0 + (by_row ? j : i);
    if (o >= s.rows || column >= s.columns) continue;
    const float w = op.weight_at(op.first_weight() + static_cast<int64_t>(o) * s.columns + column);
    const float other = by_row ? op.cs(column_at(s, op.tap_major(), column).channel) : op.rs(o);
    total += static_cast<double>(grad) * w * (by_row ? tile[i][j] : tile[j][i]) * other;
  }
  if (by_row && row0 + i < s.rows) {
    v.floats[op.work.row_sums + (group * column_tiles + item.tile % column_tiles) * s.rows + row0 +
             i] = static_cast<float>(total);
  }
  if (!by_row && column0 + i < s.columns) {
    v.floats[op.work.column_sums +
             (group * tiles_of(s.rows) + item.tile / column_tiles) * s.columns + column0 + i] =
        static_cast<float>(total);
  }
}

template <int kCapacity>
__global__ void __launch_bounds__(kBlockThreads)
    gradient_kernel(View v, const __grid_constant__ Words<kCapacity> tensors,
                    const __grid_constant__ Words<kCapacity> grads) {
  const Item item = v.items[blockIdx.x];
  v.tensors = tensors.word;
  const Op op(v, item.op, item.group);
  const Stencil& s = op.s;
  const int32_t column_tiles = tiles_of(s.columns);
  const int32_t row0 = item.tile / column_tiles * kTileSide;
  const int32_t column0 = item.tile % column_tiles * kTileSide;
  float* out = address_of<float>(grads.word[op.row.weight_slot]);
  const bool sums =
      v.grad_scales != nullptr && (op.row_scale != nullptr || op.column_scale != nullptr);
  if (out == nullptr && !sums) return;
  const float grad = v.grad_sigmas[item.op];
  TileSum gradient;
  acting_gradient(v, op, row0, column0, gradient);
  const SharedTile& tile = share_tile(gradient);
  if (out != nullptr) {
    for_each_entry(tile, [&](int32_t row, int32_t i, float entry) {
      const int32_t o = row0 + row, column = column0 + i;
      if (o >= s.rows || column >= s.columns) return;
      const float scale = op.rs(o) * op.cs(column_at(s, op.tap_major(), column).channel);
      float& to = out[op.first_weight() + static_cast<int64_t>(o) * s.columns + column];
      const float value = grad * scale * entry;
      to = op.work.accumulate ? to + value : value;
    });
  }
  if (sums) write_sums(v, op, item, row0, column0, grad, tile);
}

// Gradient of the scale buffer: one block per operator and group.
template <int kCapacity>
__global__ void __launch_bounds__(kBlockThreads)
    sums_kernel(View v, const __grid_constant__ Words<kCapacity> tensors) {
  const Item item = v.items[blockIdx.x];
  const OpRow& row = v.rows[item.op];
  const OpWork& work = v.work[item.op];
  const Stencil& s = v.work[item.op].stencil;
  const bool tap_major = has_bit(tensors.word[row.weight_slot], kTapMajorBit);
  const int32_t row_tiles = tiles_of(s.rows), column_tiles = tiles_of(s.columns);
  const int64_t group = item.group;
  if (row.row_scale >= 0) {
    for (int32_t o = threadIdx.x; o < s.rows; o += kBlockThreads) {
      double total = 0;
      for (int32_t tile = 0; tile < column_tiles; ++tile) {
        total += v.floats[work.row_sums + (group * column_tiles + tile) * s.rows + o];
      }
      v.grad_scales[row.row_scale + group * s.rows + o] = static_cast<float>(total);
    }
  }
  if (row.column_scale >= 0) {
    for (int32_t c = threadIdx.x; c < s.channels; c += kBlockThreads) {
      double total = 0;
      for (int32_t tile = 0; tile < row_tiles; ++tile) {
        for (int32_t tap = 0; tap < s.taps; ++tap) {
          total += v.floats[work.column_sums + (group * row_tiles + tile) * s.columns +
                            column_of(s, tap_major, c, tap)];
        }
      }
      v.grad_scales[row.column_scale + group * s.channels + c] = static_cast<float>(total);
    }
  }
}

// Derivatives of a factor's value in the entries of its two tensors.
struct FactorSlopes {
  double slot, variance;
};

__device__ FactorSlopes slopes_at(const View& v, int64_t k, int64_t i) {
  const lmtfast_scale_row& scale = v.scales[k];
  const ScaleFactor f = factor_at(scale, v.tensors, i);
  double others = v.grad_scales[scale.offset + i];
  for (int64_t other = 0; other < v.n_scales; ++other) {
    if (other == k || v.scales[other].offset != scale.offset) continue;
    others *= factor_at(v.scales[other], v.tensors, i).value;
  }
  // value = (constant t / root)^(+-1), root = sqrt(variance + eps)
  const double per_numerator = scale.inverse ? -f.value / f.numerator : 1.0 / f.root;
  const double sign = scale.inverse ? -1.0 : 1.0;
  return {others * scale.constant * per_numerator,
          others * -0.5 * sign * f.value / (f.root * f.root)};
}

// One block per tensor of scales: factors that read it, in the order of the table.
template <int kCapacity>
__global__ void __launch_bounds__(kBlockThreads, 1)
    scales_kernel(View v, const __grid_constant__ Words<kCapacity> tensors,
                  const __grid_constant__ Words<kCapacity> grads) {
  const int32_t slot = v.items[blockIdx.x].op;
  v.tensors = tensors.word;
  float* out = address_of<float>(grads.word[slot]);
  if (out == nullptr) return;
  const bool single = has_bit(tensors.word[slot], kSingleBit);
  double whole = 0;
  bool first = true;
  for (int64_t k = 0; k < v.n_scales; ++k) {
    const lmtfast_scale_row& scale = v.scales[k];
    if (scale.slot != slot && scale.variance_slot != slot) continue;
    double sum = 0;
    for (int64_t i = threadIdx.x; i < scale.length; i += kBlockThreads) {
      const FactorSlopes slopes = slopes_at(v, k, i);
      double grad = 0;
      if (scale.slot == slot) grad += slopes.slot;
      if (scale.variance_slot == slot) grad += slopes.variance;
      sum += grad;
      if (!single) out[i] = static_cast<float>(first ? grad : out[i] + grad);
    }
    if (single) whole += Team<true>::sum(sum);
    first = false;
  }
  if (single && threadIdx.x == 0) *out = static_cast<float>(whole);
}

// The separable image as its gradient reads it: mixed by the overlap of the shifted patterns.
__global__ void __launch_bounds__(kBlockThreads, 1) gradient_grid_kernel(View v) {
  const Item item = v.items[blockIdx.x];
  const OpRow& row = v.rows[item.op];
  const float* saved = v.saved + row.saved_offset;
  const Op op(v, item.op, static_cast<int32_t>(saved[0]));
  const Stencil& s = op.s;
  const int32_t rank = static_cast<int32_t>(row.rank);
  // The first group's share of the workspace serves whichever group has won.
  float* patterns = v.floats + op.work.patterns;
  float* overlap = v.floats + op.work.overlap;
  float* image = v.floats + op.work.image;
  float* mixed = v.floats + op.work.mixed;
  const float* h = saved + 2;
  const float* y = h + static_cast<int64_t>(s.inputs + s.channels) * rank;
  const float sigma = saved[1];
  const float inverse = sigma > 0.0f ? 1.0f / sigma : 1.0f;
  const auto widen_rows = [&](float* to, const float* from, int64_t rows, float factor) {
    for (int64_t i = threadIdx.x; i < rows * kPanel; i += kBlockThreads) {
      const int64_t c = i % kPanel;
      to[i] = c < rank ? from[i / kPanel * rank + c] * factor : 0.0f;
    }
  };
  widen_rows(patterns, h, s.inputs, 1.0f);
  widen_rows(image, y, static_cast<int64_t>(s.rows) * s.taps, inverse);
  __syncthreads();
  overlap_of(op, patterns, rank, overlap);
  mix_image(op, image, overlap, rank, mixed);
}

}  // namespace

void launch_gradient_grid(const View& view, unsigned blocks, Stream stream) {
  LMTFAST_LAUNCH(gradient_grid_kernel, blocks, kBlockThreads, 0, stream, view);
}

void launch_gradient(const View& view, const uint64_t* tensors, const uint64_t* grads,
                     unsigned blocks, Stream stream) {
  with_capacity(view.n_tensors, [&](auto capacity) {
    LMTFAST_LAUNCH(gradient_kernel<capacity>, blocks, kBlockThreads, 0, stream, view,
                   words_of<capacity>(tensors, view.n_tensors),
                   words_of<capacity>(grads, view.n_tensors));
  });
}

void launch_scale_gradient(const View& view, const uint64_t* tensors, const uint64_t* grads,
                           unsigned sums, unsigned slots, Stream stream) {
  View second = view;
  second.items += sums;
  with_capacity(view.n_tensors, [&](auto capacity) {
    const auto words = words_of<capacity>(tensors, view.n_tensors);
    LMTFAST_LAUNCH(sums_kernel<capacity>, sums, kBlockThreads, 0, stream, view, words);
    LMTFAST_LAUNCH(scales_kernel<capacity>, slots, kBlockThreads, 0, stream, second, words,
                   words_of<capacity>(grads, view.n_tensors));
  });
}

}  // namespace lmtfast::cuda
