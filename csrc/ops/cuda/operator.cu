// SPDX-License-Identifier: MIT
// The power iteration on convolutions: A v, then A^T u. The last of a step's products also scales.
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

// One tile of A v, or of the adjoint; returns its sum of squares.
template <bool kAdjoint>
__device__ double product_tile(const Op& op, const Ends& ends, int32_t tile) {
  const Stencil& s = op.s;
  const int32_t rows = kAdjoint ? s.channels : s.rows, columns = kAdjoint ? s.inputs : s.outputs;
  const int32_t units = kAdjoint ? s.rows : s.channels;
  const int32_t positions = kAdjoint ? s.outputs : s.inputs;
  const int32_t tiles = tiles_of(columns);
  const int32_t row0 = tile / tiles * kTileSide, column0 = tile % tiles * kTileSide;
  const TapDepth depth(units, s.taps);
  const int64_t first = static_cast<int64_t>(op.group) * units * positions;
  const Planes plain{ends.input + first, positions, nullptr, ends.factor};
  Planes scaled = plain;
  scaled.scale = kAdjoint ? op.row_scale : op.column_scale;
  TileSum sum;
  tile_product(ProductWeights<kAdjoint>{op, depth}, ProductPlanes<kAdjoint>{op, depth, scaled},
               rows, columns, row0, column0, depth.steps(), sum);
  const Point centre = point_of(s.kernel, centre_tap(s));
  const float identity = op.identity();
  float* out = ends.output + static_cast<int64_t>(op.group) * rows * columns;
  double square = 0;
  for_each_entry(share_tile(sum), [&](int32_t row, int32_t column, float entry) {
    const int32_t i = row0 + row, p = column0 + column;
    if (i >= rows || p >= columns) return;
    float value = entry * (kAdjoint ? op.cs(i) : op.rs(i));
    if (identity != 0.0f && i < units) {
      const Point from = point_of(kAdjoint ? s.in : s.out, p);
      value += identity * plain.seen<kAdjoint>(s, i, from, centre);
    }
    out[static_cast<int64_t>(i) * columns + p] = value;
    square += static_cast<double>(value) * static_cast<double>(value);
  });
  return square;
}

// Entries that a thread has on their way at once.
constexpr int kScaledAtOnce = 16;

// body(i, x[i]) for the entries of one of `blocks` blocks. All loads come first: the compiler cannot
// tell what body writes from x.
template <class Body>
__device__ void for_each_of(const float* x, int64_t size, int64_t block, int64_t blocks,
                            const Body& body) {
  const int64_t step = blocks * kBlockThreads;
  for (int64_t first = block * kBlockThreads + threadIdx.x; first < size;
       first += kScaledAtOnce * step) {
    float held[kScaledAtOnce];
    LMTFAST_UNROLL
    for (int k = 0; k < kScaledAtOnce; ++k) {
      held[k] = first + k * step < size ? x[first + k * step] : 0.0f;
    }
    LMTFAST_UNROLL
    for (int k = 0; k < kScaledAtOnce; ++k) {
      if (first + k * step < size) body(first + k * step, held[k]);
    }
  }
}

// What a step's last product adds: unit u and v, the new iterate, sigma. Every block scales its share
// of the vector that was read; the block that completes the other one knows its length and scales it.
__device__ void finish(const View& v, const Op& op, int32_t index, const Ends& ends, int64_t block,
                       bool second) {
  const OpWork& w = op.work;
  const Stencil& s = op.s;
  const int64_t blocks = second ? w.backs : w.images;
  const int64_t inside = static_cast<int64_t>(s.groups) * s.channels * s.inputs;
  const int64_t outside = static_cast<int64_t>(s.groups) * s.rows * s.outputs;
  const int64_t n = s.transposed ? outside : inside, m = s.transposed ? inside : outside;
  float* u = v.saved + op.row.saved_offset;
  float* read = second ? u : u + m;
  float* written = second ? u + m : u;
  for_each_of(ends.input, second ? m : n, block, blocks,
              [&](int64_t i, float x) { read[i] = x * ends.factor; });
  if (!last_of(v.counters + w.counters, static_cast<int32_t>(blocks))) return;
  const double norm =
      std::sqrt(block_sum_of(v.doubles + (second ? w.back_sums : w.image_sums), blocks));
  if (threadIdx.x == 0) v.sigmas[index] = static_cast<float>(norm);
  const float* source = ends.output;
  float factor = inverse_or_one(norm);
  if (second && !(norm > 0.0 && norm - norm == 0.0)) {
    // The iterate stays as it was.
    source = v.state + op.row.state_offset;
    factor = inverse_or_one(std::sqrt(block_sum_of(v.doubles + w.input_sums, w.inputs)));
  }
  // sigma = <u, A v> holds for the v that it was read at: the new one, if there is one.
  float* next = second ? v.new_state + op.row.state_offset : written;
  for_each_of(source, second ? n : m, 0, 1,
              [&](int64_t i, float x) { written[i] = next[i] = x * factor; });
}

// A launch of images and one of adjoints: a transposed convolution has them the other way round.
template <bool kAdjoint>
__global__ void __launch_bounds__(kBlockThreads, 2) stencil_kernel(View v, bool second) {
  const Item item = v.items[blockIdx.x];
  const Op op(v, item.op, item.group);
  const OpWork& w = op.work;
  Ends ends;
  if (second) {
    ends.input = v.floats + w.image;
    ends.output = v.floats + w.back;
    ends.factor = inverse_or_one(std::sqrt(block_sum_of(v.doubles + w.image_sums, w.images)));
  } else {
    ends.input = v.state + op.row.state_offset;
    ends.output = v.floats + w.image;
    ends.factor = inverse_or_one(std::sqrt(block_sum_of(v.doubles + w.input_sums, w.inputs)));
  }
  const double square = product_tile<kAdjoint>(op, ends, item.tile);
  const int64_t block = static_cast<int64_t>(item.group) * item.tiles + item.tile;
  write_sum(v.doubles + (second ? w.back_sums : w.image_sums), block, square);
  if (second || v.new_state == nullptr) finish(v, op, item.op, ends, block, second);
}

}  // namespace

void launch_stencil(const View& view, bool adjoint, bool second, unsigned blocks, Stream stream) {
  const auto kernel = adjoint ? stencil_kernel<true> : stencil_kernel<false>;
  LMTFAST_LAUNCH(kernel, blocks, kBlockThreads, kTileBytes, stream, view, second);
}

}  // namespace lmtfast::cuda
