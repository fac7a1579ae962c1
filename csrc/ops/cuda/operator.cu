// SPDX-License-Identifier: MIT
// The power iteration on convolutions: A v, A^T u, then norms and scaling, two products per step.
// Floor: two multiply-adds per weight and output position, in float32; bytes are far below.
#include <cmath>

#include "ops/cuda/operator.h"
#include "ops/cuda/spectral.h"

namespace lmtfast::cuda {
namespace {

// The vector a product reads and the one it writes.
struct Ends {
  const float* input;
  float* output;
  float factor;  // makes the input a unit vector
};

// Sums of squares of this block, for the launch that follows.
__device__ void write_sum(double* sums, int64_t index, double square) {
  const double total = Team<true>::sum(square);
  if (threadIdx.x == 0) sums[index] = total;
}

__device__ double image_tile(const Op& op, const Ends& ends, int32_t tile) {
  const int32_t tiles = tiles_of(op.s.outputs);
  const int32_t row0 = tile / tiles * kTileSide, column0 = tile % tiles * kTileSide;
  const TapDepth depth(op.s.channels, op.s.taps);
  const int64_t first = static_cast<int64_t>(op.group) * op.s.channels * op.s.inputs;
  const Planes plain{ends.input + first, op.s.channels, op.s.inputs, nullptr, ends.factor};
  Planes scaled = plain;
  scaled.scale = op.column_scale;
  TileSum sum;
  tile_product(ImageWeights{op, depth}, ImageInputs{op, depth, scaled}, op.s.rows, op.s.outputs,
               row0, column0, depth.steps(), sum);
  const Point centre = point_of(op.s.kernel, centre_tap(op.s));
  const float identity = op.identity();
  float* out = ends.output + static_cast<int64_t>(op.group) * op.s.rows * op.s.outputs;
  double square = 0;
  for_each_entry(share_tile(sum), [&](int32_t row, int32_t column, float entry) {
    const int32_t o = row0 + row, p = column0 + column;
    if (o >= op.s.rows || p >= op.s.outputs) return;
    float value = entry * op.rs(o);
    if (identity != 0.0f && o < op.s.channels) {
      const int32_t q = input_of(op.s, point_of(op.s.out, p), centre);
      if (q >= 0) value += identity * plain.at(o, q);
    }
    out[static_cast<int64_t>(o) * op.s.outputs + p] = value;
    square += static_cast<double>(value) * static_cast<double>(value);
  });
  return square;
}

__device__ double adjoint_tile(const Op& op, const Ends& ends, int32_t tile) {
  const int32_t tiles = tiles_of(op.s.inputs);
  const int32_t row0 = tile / tiles * kTileSide, column0 = tile % tiles * kTileSide;
  const TapDepth depth(op.s.rows, op.s.taps);
  const int64_t first = static_cast<int64_t>(op.group) * op.s.rows * op.s.outputs;
  const Planes plain{ends.input + first, op.s.rows, op.s.outputs, nullptr, ends.factor};
  Planes scaled = plain;
  scaled.scale = op.row_scale;
  TileSum sum;
  tile_product(AdjointWeights{op, depth}, AdjointOutputs{op, depth, scaled}, op.s.channels,
               op.s.inputs, row0, column0, depth.steps(), sum);
  const Point centre = point_of(op.s.kernel, centre_tap(op.s));
  const float identity = op.identity();
  float* out = ends.output + static_cast<int64_t>(op.group) * op.s.channels * op.s.inputs;
  double square = 0;
  for_each_entry(share_tile(sum), [&](int32_t row, int32_t column, float entry) {
    const int32_t c = row0 + row, q = column0 + column;
    if (c >= op.s.channels || q >= op.s.inputs) return;
    float value = entry * op.cs(c);
    if (identity != 0.0f && c < op.s.rows) {
      for (int32_t wrap = 0; wrap < wraps_of(op.s); ++wrap) {
        const int32_t p = output_of(op.s, point_of(op.s.in, q), centre, wrap_of(op.s, wrap));
        if (p >= 0) value += identity * plain.at(c, p);
      }
    }
    out[static_cast<int64_t>(c) * op.s.inputs + q] = value;
    square += static_cast<double>(value) * static_cast<double>(value);
  });
  return square;
}

// A launch of images and one of adjoints: a transposed convolution has them the other way round.
template <bool kAdjoint>
__global__ void __launch_bounds__(kBlockThreads) stencil_kernel(View v, bool second) {
  const Item item = v.items[blockIdx.x];
  const Op op(v, item.op, item.group);
  const OpWork& w = op.work;
  Ends ends;
  if (second) {
    ends.input = v.saved + op.row.saved_offset;
    ends.output = v.new_state + op.row.state_offset;
    ends.factor = inverse_or_one(std::sqrt(block_sum_of(v.doubles + w.image_sums, w.images)));
  } else {
    ends.input = v.state + op.row.state_offset;
    ends.output = v.saved + op.row.saved_offset;
    ends.factor = inverse_or_one(std::sqrt(block_sum_of(v.doubles + w.input_sums, w.inputs)));
  }
  const double square =
      kAdjoint ? adjoint_tile(op, ends, item.tile) : image_tile(op, ends, item.tile);
  write_sum(v.doubles + (second ? w.back_sums : w.image_sums),
            static_cast<int64_t>(item.group) * item.tiles + item.tile, square);
}

// Scales what the products left: saved u and v, the new iterate, sigma.
__global__ void __launch_bounds__(kBlockThreads) finish_kernel(View v) {
  const Item item = v.items[blockIdx.x];
  const Op op(v, item.op, 0);
  const bool update = v.new_state != nullptr;
  const double input = std::sqrt(block_sum_of(v.doubles + op.work.input_sums, op.work.inputs));
  const double image = std::sqrt(block_sum_of(v.doubles + op.work.image_sums, op.work.images));
  const double back =
      update ? std::sqrt(block_sum_of(v.doubles + op.work.back_sums, op.work.backs)) : 0.0;
  const bool usable = back > 0.0 && back - back == 0.0;
  const int64_t inside = static_cast<int64_t>(op.s.groups) * op.s.channels * op.s.inputs;
  const int64_t outside = static_cast<int64_t>(op.s.groups) * op.s.rows * op.s.outputs;
  const int64_t n = op.s.transposed ? outside : inside, m = op.s.transposed ? inside : outside;
  float* u = v.saved + op.row.saved_offset;
  const int64_t begin = static_cast<int64_t>(item.tile) * kVectorEntries;
  for (int64_t i = begin + threadIdx.x; i < begin + kVectorEntries; i += kBlockThreads) {
    if (i < m) u[i] *= inverse_or_one(image);
    if (i < n) {
      float unit = v.state[op.row.state_offset + i] * inverse_or_one(input);
      if (update) {
        float& next = v.new_state[op.row.state_offset + i];
        unit = next = usable ? next * inverse_or_one(back) : unit;
      }
      // sigma = <u, A v> holds for the v that it was read at: the new one, if there is one.
      u[m + i] = unit;
    }
  }
  if (item.tile == 0 && threadIdx.x == 0) {
    v.sigmas[item.op] = static_cast<float>(update ? back : image);
  }
}

}  // namespace

void launch_stencil(const View& view, bool adjoint, bool second, unsigned blocks, Stream stream) {
  const auto kernel = adjoint ? stencil_kernel<true> : stencil_kernel<false>;
  LMTFAST_LAUNCH(kernel, blocks, kBlockThreads, 0, stream, view, second);
}

void launch_finish(const View& view, unsigned blocks, Stream stream) {
  LMTFAST_LAUNCH(finish_kernel, blocks, kBlockThreads, 0, stream, view);
}

}  // namespace lmtfast::cuda
