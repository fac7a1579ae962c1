// SPDX-License-Identifier: MIT
// Gradients of the norms in the weights and in their channel scales, in one launch. Floor: one write
// of every gradient, and for the power iteration one multiply-add per weight and output position.
#include <cmath>

#include "ops/cuda/operator.h"
#include "ops/cuda/scales.h"
#include "ops/cuda/spectral.h"

namespace lmtfast::cuda {
namespace {

// Vectors that a step saved (csrc/ops/spectral.h).
__device__ bool loses(const View& v, const Op& op) {
  const auto method = static_cast<Method>(op.work.method);
  if (method == Method::kStencil || method == Method::kMatrix) return false;
  return static_cast<int32_t>(v.saved[op.row.saved_offset]) != op.group;
}

// Gradient of sigma in the acting kernel at one entry, where it is no sum over positions.
__device__ float panel_gradient(const View& v, const Op& op, int32_t o, int32_t column) {
  const Stencil& s = op.s;
  const float* saved = v.saved + op.row.saved_offset;
  if (static_cast<Method>(op.work.method) == Method::kMatrix) {
    return saved[o] * saved[s.rows + column];
  }
  const Column at = column_at(s, op.tap_major(), column);
  const int32_t rank = static_cast<int32_t>(op.row.rank);
  const float* a = saved + 2 + static_cast<int64_t>(s.inputs + at.channel) * rank;
  const float* mixed = saved + 2 + static_cast<int64_t>(s.inputs + s.channels) * rank +
                       (static_cast<int64_t>(o) * s.taps + at.tap) * rank;
  float sum = 0.0f;
  for (int k = 0; k < rank; ++k) sum = std::fma(mixed[k], a[k], sum);
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

// Where a gradient goes.
struct Target {
  struct alignas(16) Four {
    float v[4];
  };
  float* data;      // of the weight, or null
  bool accumulate;  // to what is there
  bool sums;        // of rows and columns, for the scales

  // Four neighbours at `at`, of which `left` exist; in one piece where rows are aligned.
  __device__ void store(int64_t at, int32_t left, bool aligned, const float (&value)[4]) const {
    float* to = data + at;
    if (aligned) {
      LMTFAST_ALIGNED(to, sizeof(Four));
      Four four = accumulate ? *reinterpret_cast<const Four*>(to) : Four{};
      LMTFAST_UNROLL
      for (int i = 0; i < 4; ++i) four.v[i] = accumulate ? four.v[i] + value[i] : value[i];
      *reinterpret_cast<Four*>(to) = four;
      return;
    }
    LMTFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i < left) to[i] = accumulate ? to[i] + value[i] : value[i];
    }
  }
  __device__ bool aligned(const Stencil& s) const {
    return reinterpret_cast<uintptr_t>(data) % sizeof(Four) == 0 && s.columns % 4 == 0;
  }
};

// An outer product's stretch of rows: a thread keeps its four columns.
__device__ void strip_gradient(const View& v, const Op& op, const Item& item, float grad,
                               const Target& target) {
  const Stencil& s = op.s;
  const int32_t across = static_cast<int32_t>((s.columns + kStripColumns - 1) / kStripColumns);
  const int32_t row0 = item.tile / across * kTileSide;
  const int32_t column0 =
      item.tile % across * kStripColumns + 4 * static_cast<int32_t>(threadIdx.x);
  const int32_t left = s.columns - column0;
  const int32_t row_end = s.rows - row0 < kTileSide ? s.rows : row0 + kTileSide;
  if (left <= 0) return;
  const bool symbol = static_cast<Method>(op.work.method) == Method::kSymbol;
  const float* u = v.saved + op.row.saved_offset + (symbol ? 1 : 0);
  const float* z = u + (symbol ? 2 : 1) * static_cast<int64_t>(s.rows);
  const bool lost = loses(v, op);
  float re[4] = {}, im[4] = {}, scale[4] = {}, total[4] = {}, value[4];
  LMTFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i >= left || lost) continue;
    const Column at = column_at(s, op.tap_major(), column0 + i);
    const int64_t entry = column_of(s, false, at.channel, at.tap);
    re[i] = z[symbol ? 2 * entry : entry];
    im[i] = symbol ? z[2 * entry + 1] : 0.0f;
    scale[i] = op.cs(at.channel);
  }
  const bool aligned = target.aligned(s);
  const bool by_column = target.sums && op.column_scale != nullptr;
  for (int32_t o = row0; o < row_end; ++o) {
    const int64_t at = op.first_weight() + static_cast<int64_t>(o) * s.columns + column0;
    const float u_re = lost ? 0.0f : u[symbol ? 2 * o : o];
    const float u_im = lost || !symbol ? 0.0f : u[2 * o + 1];
    const float row_scale = op.rs(o);
    LMTFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float entry = std::fma(u_re, re[i], u_im * im[i]);
      value[i] = grad * (row_scale * scale[i]) * entry;
      if (by_column && i < left) {
        total[i] = std::fma(op.weight_at(at + i), row_scale * entry, total[i]);
      }
    }
    if (target.data != nullptr) target.store(at, left, aligned, value);
  }
  if (!by_column) return;
  float* sums =
      v.floats + op.work.column_sums +
      (static_cast<int64_t>(item.group) * tiles_of(s.rows) + item.tile / across) * s.columns +
      column0;
  LMTFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (i < left) sums[i] = grad * total[i];
  }
}

__device__ void tile_gradient(const View& v, const Op& op, const Item& item, float grad,
                              const Target& target) {
  const Stencil& s = op.s;
  const int32_t column_tiles = tiles_of(s.columns);
  const int32_t row0 = item.tile / column_tiles * kTileSide;
  const int32_t column0 = item.tile % column_tiles * kTileSide;
  TileSum gradient;
  acting_gradient(v, op, row0, column0, gradient);
  const SharedTile& tile = share_tile(gradient);
  const bool aligned = target.aligned(s);
  for (int32_t i = threadIdx.x; i < kTileSide * kTileSide / 4 && target.data != nullptr;
       i += kTileThreads) {
    const int32_t row = i / (kTileSide / 4), first = i % (kTileSide / 4) * 4;
    const int32_t o = row0 + row, left = s.columns - column0 - first;
    if (o >= s.rows || left <= 0) continue;
    float value[4] = {};
    LMTFAST_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k >= left) continue;
      const float scale =
          op.rs(o) * op.cs(column_at(s, op.tap_major(), column0 + first + k).channel);
      value[k] = grad * scale * tile[row][first + k];
    }
    target.store(op.first_weight() + static_cast<int64_t>(o) * s.columns + column0 + first, left,
                 aligned, value);
  }
  if (target.sums) write_sums(v, op, item, row0, column0, grad, tile);
}

// Gradient of the scale buffer, of a diagonal map: all of it belongs to the entry that is the norm.
__device__ void sign_scales(const View& v, const Item& item) {
  const OpRow& row = v.rows[item.op];
  const float* scales = v.saved + row.row_scale;
  const int64_t at = largest_entry(scales, row.rows);
  const float grad = v.grad_sigmas[item.op];
  for (int64_t i = threadIdx.x; i < row.rows; i += kBlockThreads) {
    const float x = i == at ? scales[i] : 0.0f;
    v.grad_scales[row.row_scale + i] = x == 0.0f ? 0.0f : x < 0.0f ? -grad : grad;
  }
}

// Of one operator and group.
__device__ void sum_scales(const View& v, const Item& item) {
  const Op op(v, item.op, item.group);
  const OpRow& row = op.row;
  const OpWork& work = op.work;
  const Stencil& s = op.s;
  const int32_t row_tiles = tiles_of(s.rows), column_tiles = tiles_of(s.columns);
  const int64_t group = item.group;
  const bool symbol = static_cast<Method>(work.method) == Method::kSymbol;
  if (row.row_scale >= 0) {
    const float* u = v.saved + row.saved_offset + 1;
    const float* p = u + 2 * (static_cast<int64_t>(s.rows) + s.columns);
    const double grad = loses(v, op) ? 0.0 : v.grad_sigmas[item.op];
    for (int32_t o = threadIdx.x; o < s.rows; o += kBlockThreads) {
      double total = 0;
      if (symbol) {
        // The sum over the row of weights, column scales and z is saved.
        if (grad != 0.0) {
          total = grad * (static_cast<double>(u[2 * o]) * p[2 * o] +
                          static_cast<double>(u[2 * o + 1]) * p[2 * o + 1]);
        }
      } else {
        for (int32_t tile = 0; tile < column_tiles; ++tile) {
          total += v.floats[work.row_sums + (group * column_tiles + tile) * s.rows + o];
        }
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
                            column_of(s, op.tap_major(), c, tap)];
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

// Of factor k at entry i; those among others_begin.. with its offset are its companions.
__device__ FactorSlopes slopes_at(const View& v, int64_t k, int64_t i, int64_t others_begin,
                                  int64_t others_end) {
  const lmtfast_scale_row& scale = v.scales[k];
  const ScaleFactor f = factor_at(scale, v.tensors, i);
  double others = v.grad_scales[scale.offset + i];
  for (int64_t other = others_begin; other < others_end; ++other) {
    if (other == k || v.scales[other].offset != scale.offset) continue;
    others *= factor_at(v.scales[other], v.tensors, i).value;
  }
  // value = (constant t / root)^(+-1), root = sqrt(variance + eps)
  const double per_numerator = scale.inverse ? -f.value / f.numerator : 1.0 / f.root;
  const double sign = scale.inverse ? -1.0 : 1.0;
  return {others * scale.constant * per_numerator,
          others * -0.5 * sign * f.value / (f.root * f.root)};
}

// Adds one factor's share to the gradient of one tensor; `first`: nothing is there yet.
__device__ void add_slot(const View& v, const Item& item, bool first, float* out) {
  const int64_t slot = item.op, k = item.group;
  const lmtfast_scale_row& scale = v.scales[k];
  const bool single = has_bit(v.tensors[slot], kSingleBit);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < scale.length; i += kBlockThreads) {
    const FactorSlopes slopes = slopes_at(v, k, i, item.tile, item.tiles);
    double grad = 0;
    if (scale.slot == slot) grad += slopes.slot;
    if (scale.variance_slot == slot) grad += slopes.variance;
    sum += grad;
    if (!single) out[i] = static_cast<float>(first ? grad : out[i] + grad);
  }
  if (!single) return;
  sum = Team<true>::sum(sum);
  if (threadIdx.x == 0) *out = static_cast<float>(first ? sum : *out + sum);
}

// All scales of a circle, by the block that completed its weight gradients.
template <int kCapacity>
__device__ void scale_gradients(const View& v, const Circle& circle,
                                const Words<kCapacity>& grads) {
  for (int64_t i = circle.sums_begin; i < circle.sums_end; ++i) {
    const Item item = v.sums[i];
    if (v.rows[item.op].kind == LMTFAST_DIAGONAL) {
      sign_scales(v, item);
    } else {
      sum_scales(v, item);
    }
  }
  __syncthreads();
  for (int64_t i = circle.slots_begin; i < circle.slots_end; ++i) {
    const Item item = v.slots[i];
    float* out = address_of<float>(grads.word[item.op]);
    const bool first = i == circle.slots_begin || v.slots[i - 1].op != item.op;
    if (out != nullptr) add_slot(v, item, first, out);
    __syncthreads();
  }
}

// A block writes its part of a gradient for all operators that add to it, one after another.
template <int kCapacity>
__global__ void __launch_bounds__(kBlockThreads, 2)
    gradient_kernel(View v, const __grid_constant__ Words<kCapacity> tensors,
                    const __grid_constant__ Words<kCapacity> grads) {
  const Item item = v.items[blockIdx.x];
  v.tensors = tensors.word;
  const bool weights = v.rows[item.op].kind == LMTFAST_STENCIL;
  for (int64_t index = weights ? item.op : -1; index >= 0; index = v.work[index].tied) {
    const Op op(v, static_cast<int32_t>(index), item.group);
    const Target target{
        address_of<float>(grads.word[op.row.weight_slot]),
        v.work[item.op].accumulate || index != item.op,
        v.grad_scales != nullptr && (op.row_scale != nullptr || op.column_scale != nullptr)};
    if (target.data == nullptr && !target.sums) continue;
    const float grad = v.grad_sigmas[index];
    if (gradient_in_strips(op.row)) {
      strip_gradient(v, op, item, grad, target);
    } else {
      tile_gradient(v, op, item, grad, target);
    }
    __syncthreads();
  }
  const int64_t circle = v.work[item.op].circle;
  if (v.grad_scales == nullptr || circle < 0) return;
  if (!last_of(v.counters + circle, static_cast<int32_t>(v.circles[circle].blocks))) return;
  scale_gradients(v, v.circles[circle], grads);
}

}  // namespace

void launch_gradient(const View& view, const uint64_t* tensors, const uint64_t* grads,
                     unsigned blocks, Stream stream) {
  with_capacity(view.n_tensors, [&](auto capacity) {
    LMTFAST_LAUNCH(gradient_kernel<capacity>, blocks, kBlockThreads, kTileBytes, stream, view,
                   words_of<capacity>(tensors, view.n_tensors),
                   words_of<capacity>(grads, view.n_tensors));
  });
}

}  // namespace lmtfast::cuda
