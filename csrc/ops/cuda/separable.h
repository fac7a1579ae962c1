// SPDX-License-Identifier: MIT
// The separable engine's step around its two products with the weights
// (lmtfast/engines/separable.py), one block per group: orthonormal channel vectors before; the grid's
// share between; the new factors after. Vectors are padded to eight columns of zeros.
#pragma once

#include "ops/cuda/operator.h"
#include "ops/cuda/panel.h"

namespace lmtfast::cuda {

// Power steps on the grid per step; they do not read the weights.
constexpr int kGridSteps = 2;

struct Separable {
  const View& v;
  const Op& op;
  int32_t rank, pairs;  // pairs of a tap and a pattern
  const float* state;   // of the group: h (inputs, rank), a (channels, rank)
  float *plain, *panel, *image, *mixed, *back, *patterns, *next, *grid, *gram, *overlap;
  double* values;

  __device__ Separable(const View& view, const Op& o) : v(view), op(o) {
    const OpWork& w = op.work;
    const Stencil& s = op.s;
    const int64_t g = op.group;
    rank = static_cast<int32_t>(op.row.rank);
    pairs = s.taps * rank;
    const int64_t padded = static_cast<int64_t>(s.taps) * kPanel;
    state = v.state + state_offset();
    plain = v.floats + w.plain + g * s.channels * kPanel;
    panel = v.floats + w.panel + g * s.channels * kPanel;
    image = v.floats + w.image + g * s.rows * padded;
    mixed = v.floats + w.mixed + g * s.rows * padded;
    back = v.floats + w.back + g * s.columns * kPanel;
    patterns = v.floats + w.patterns + g * s.inputs * kPanel;
    next = v.floats + w.next + g * s.inputs * kPanel;
    grid = v.floats + w.grid + g * s.outputs * padded;
    gram = v.floats + w.gram + g * padded * padded;
    overlap = v.floats + w.overlap + g * padded * padded;
    values = v.doubles + w.values + g * 2;
  }
  __device__ int64_t state_offset() const {
    return op.row.state_offset +
           static_cast<int64_t>(op.group) * rank * (op.s.inputs + op.s.channels);
  }
};

// A row-major matrix as an operand, its columns being places.
struct Matrix {
  static constexpr bool kDepthFast = false;
  using Place = int32_t;
  const float* data;
  int32_t places, depth;

  __device__ Place place(int32_t i) const { return i < places ? i : -1; }
  __device__ float at(Place i, int32_t step, int32_t lane) const {
    const int32_t k = step * kTileStep + lane;
    return i < 0 || k >= depth ? 0.0f : data[static_cast<int64_t>(k) * places + i];
  }
};

// The image (rows, taps, 8), of which `rank` columns count: rows are places and (tap, pattern) pairs
// the depth, or (kPairs) the other way round.
template <bool kPairs>
struct ImageOperand {
  static constexpr bool kDepthFast = !kPairs;
  using Place = int32_t;
  const float* image;
  int32_t rows, taps, rank;

  __device__ Place place(int32_t i) const {
    if (!kPairs) return i < rows ? i : -1;
    return i < taps * rank ? i / rank * kPanel + i % rank : -1;
  }
  __device__ float at(Place i, int32_t step, int32_t lane) const {
    const int32_t k = step * kTileStep + lane;
    if (i < 0 || k >= (kPairs ? rows : taps * rank)) return 0.0f;
    const int64_t row = kPairs ? k : i;
    return image[row * taps * kPanel + (kPairs ? i : k / rank * kPanel + k % rank)];
  }
};

// Patterns seen through the stencil: entry (output, (tap, pattern)).
struct Windows {
  const Op* op;
  const float* patterns;  // (inputs, 8)
  int32_t rank;

  __device__ float at(int32_t output, int32_t pair) const {
    const Point tap = point_of(op->s.kernel, pair / rank);
    const int32_t q = input_of(op->s, point_of(op->s.out, output), tap);
    return q < 0 ? 0.0f : patterns[static_cast<int64_t>(q) * kPanel + pair % rank];
  }
};

// As an operand: outputs are places and pairs the depth, or (kPairs) the other way round.
template <bool kPairs>
struct WindowOperand {
  static constexpr bool kDepthFast = false;
  using Place = int32_t;
  Windows windows;

  __device__ int32_t pairs() const { return windows.op->s.taps * windows.rank; }
  __device__ Place place(int32_t i) const {
    return i < (kPairs ? pairs() : windows.op->s.outputs) ? i : -1;
  }
  __device__ float at(Place i, int32_t step, int32_t lane) const {
    const int32_t k = step * kTileStep + lane;
    if (i < 0 || k >= (kPairs ? windows.op->s.outputs : pairs())) return 0.0f;
    return kPairs ? windows.at(k, i) : windows.at(i, k);
  }
};

// Gram matrix of the shifted patterns, (pairs, pairs).
__device__ inline void overlap_of(const Op& op, const float* patterns, int32_t rank,
                                  float* overlap) {
  const WindowOperand<true> windows{{&op, patterns, rank}};
  const int32_t pairs = windows.pairs();
  block_product(pairs, pairs, op.s.outputs, windows, windows,
                [&](int32_t i, int32_t j, float value) {
                  overlap[static_cast<int64_t>(i) * pairs + j] = value;
                });
}

// mixed (rows, taps, 8) = image times a matrix (pairs, pairs); columns that do not count are zero.
__device__ inline void mix_image(const Op& op, const float* image, const float* matrix,
                                 int32_t rank, float* mixed) {
  const Stencil& s = op.s;
  const int32_t pairs = s.taps * rank;
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(s.rows) * s.taps * kPanel;
       i += kBlockThreads) {
    if (i % kPanel >= rank) mixed[i] = 0.0f;
  }
  block_product(s.rows, pairs, pairs, ImageOperand<false>{image, s.rows, s.taps, rank},
                Matrix{matrix, pairs, pairs}, [&](int32_t i, int32_t j, float value) {
                  mixed[(static_cast<int64_t>(i) * s.taps + j / rank) * kPanel + j % rank] = value;
                });
}

// Divides `size` floats by their length; zero stays zero. Returns the length.
__device__ inline double scale_to_unit(float* data, int64_t size) {
  double square = 0;
  for (int64_t i = threadIdx.x; i < size; i += kBlockThreads) {
    square += static_cast<double>(data[i]) * static_cast<double>(data[i]);
  }
  const double norm = std::sqrt(Team<true>::sum(square));
  const float inverse = inverse_or_one(norm);
  for (int64_t i = threadIdx.x; i < size; i += kBlockThreads) data[i] *= inverse;
  __syncthreads();
  return norm;
}

// Householder QR of data (size, 8), of which `rank` columns count and rank <= size: data becomes
// orthonormal columns, the others zero, triangle (8, 8) the upper factor. A column that depends on
// those before it gets a zero on the diagonal and a direction of its own. By one warp, which needs
// no barrier among reductions: lane l owns rows l, l + 32, ... and reads row k before it changes.
__device__ inline void orthonormalise(float* data, int32_t size, int32_t rank, float* triangle) {
  using Warp = Team<false>;
  if (Warp::number() == 0) {
    const int32_t lane = Warp::rank();
    float tau[kPanel] = {};
    LMTFAST_UNROLL
    for (int k = 0; k < kPanel; ++k) {
      if (k >= rank) break;
      const PanelRow row = load_row(data, k);
      double square = 0, dot[kPanel] = {};
      // Sums with column k before it is scaled, one pass for all of them.
      for (int32_t i = lane; i < size; i += kWarpSize) {
        if (i <= k) continue;
        const PanelRow x = load_row(data, i);
        square += static_cast<double>(x.v[k]) * x.v[k];
        LMTFAST_UNROLL
        for (int c = k + 1; c < kPanel; ++c) dot[c] += static_cast<double>(x.v[k]) * x.v[c];
      }
      square = Warp::sum(square);
      const double alpha = row.v[k], norm = std::sqrt(alpha * alpha + square);
      const bool done = square == 0.0;
      const double beta = done ? alpha : alpha > 0.0 ? -norm : norm;
      const double factor = done ? 0.0 : 1.0 / (alpha - beta);
      const double reflection = done ? 0.0 : (beta - alpha) / beta;
      tau[k] = static_cast<float>(reflection);
      LMTFAST_UNROLL
      for (int c = k + 1; c < kPanel; ++c) {
        dot[c] = (Warp::sum(dot[c]) * factor + row.v[c]) * reflection;
      }
      for (int32_t i = lane; i < size; i += kWarpSize) {
        if (i <= k) continue;
        float* x = data + static_cast<int64_t>(i) * kPanel;
        const double reflector = x[k] * factor;
        x[k] = static_cast<float>(reflector);
        LMTFAST_UNROLL
        for (int c = k + 1; c < kPanel; ++c) x[c] = static_cast<float>(x[c] - dot[c] * reflector);
      }
      if (lane == 0) {
        LMTFAST_UNROLL
        for (int c = 0; c < kPanel; ++c) {
          const double entry = c < k ? 0.0 : c == k ? beta : row.v[c] - dot[c];
          triangle[k * kPanel + c] = static_cast<float>(entry);
        }
      }
      __syncwarp();
    }
    for (int32_t i = lane; i < kPanel * kPanel; i += kWarpSize) {
      if (i / kPanel >= rank) triangle[i] = 0.0f;
    }
    // The columns of the product of the reflections, last first.
    LMTFAST_UNROLL
    for (int k = kPanel - 1; k >= 0; --k) {
      if (k >= rank) continue;
      double dot[kPanel] = {};
      for (int32_t i = lane; i < size; i += kWarpSize) {
        if (i <= k) continue;
        const PanelRow x = load_row(data, i);
        LMTFAST_UNROLL
        for (int c = k + 1; c < kPanel; ++c) dot[c] += static_cast<double>(x.v[k]) * x.v[c];
      }
      LMTFAST_UNROLL
      for (int c = k + 1; c < kPanel; ++c) dot[c] = Warp::sum(dot[c]) * tau[k];
      for (int32_t i = lane; i < size; i += kWarpSize) {
        if (i < k) continue;
        float* x = data + static_cast<int64_t>(i) * kPanel;
        const float reflector = i == k ? 1.0f : x[k];
        LMTFAST_UNROLL
        for (int c = k + 1; c < kPanel; ++c) {
          x[c] = static_cast<float>((i == k ? 0.0f : x[c]) - dot[c] * reflector);
        }
        x[k] = (i == k ? 1.0f : 0.0f) - tau[k] * reflector;
      }
      __syncwarp();
    }
  }
  __syncthreads();
}

// h and a with orthonormal a, whose triangle has moved into h, and ||h|| = 1.
__device__ inline void prepare_separable(const View& v, const Op& op) {
  LMTFAST_SHARED(float, triangle, [kPanel * kPanel]);
  const Separable y(v, op);
  const Stencil& s = op.s;
  const float* h = y.state;
  const float* a = h + static_cast<int64_t>(s.inputs) * y.rank;
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(s.channels) * kPanel; i += kBlockThreads) {
    const int64_t row = i / kPanel, c = i % kPanel;
    y.plain[i] = c < y.rank ? a[row * y.rank + c] : 0.0f;
  }
  __syncthreads();
  scale_to_unit(y.plain, static_cast<int64_t>(s.channels) * kPanel);
  orthonormalise(y.plain, s.channels, y.rank, triangle);
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(s.channels) * kPanel; i += kBlockThreads) {
    y.panel[i] = op.cs(static_cast<int32_t>(i / kPanel)) * y.plain[i];
  }
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(s.inputs) * kPanel; i += kBlockThreads) {
    const int64_t row = i / kPanel, c = i % kPanel;
    float sum = 0.0f;
    for (int l = 0; l < y.rank; ++l) {
      sum = std::fma(h[row * y.rank + l], triangle[c * kPanel + l], sum);
    }
    y.patterns[i] = sum;
  }
  __syncthreads();
  scale_to_unit(y.patterns, static_cast<int64_t>(s.inputs) * kPanel);
}

// grid (outputs, pairs) = windows of h times the Gram matrix.
__device__ inline void apply_gram(const Separable& y, const float* h) {
  block_product(y.op.s.outputs, y.pairs, y.pairs, WindowOperand<false>{{&y.op, h, y.rank}},
                Matrix{y.gram, y.pairs, y.pairs}, [&](int32_t i, int32_t j, float value) {
                  y.grid[static_cast<int64_t>(i) * y.pairs + j] = value;
                });
}

// h = adjoint of the windows, of what lies on the grid.
__device__ inline void fold_grid(const Separable& y, float* h) {
  const Stencil& s = y.op.s;
  for (int32_t i = threadIdx.x; i < s.inputs * kPanel; i += kBlockThreads) {
    const Point q = point_of(s.in, i / kPanel);
    const int32_t k = i % kPanel;
    float sum = 0.0f;
    for (int32_t tap = 0; tap < s.taps && k < y.rank; ++tap) {
      for (int32_t wrap = 0; wrap < wraps_of(s); ++wrap) {
        const int32_t p = output_of(s, q, point_of(s.kernel, tap), wrap_of(s, wrap));
        if (p >= 0) sum += y.grid[static_cast<int64_t>(p) * y.pairs + tap * y.rank + k];
      }
    }
    h[i] = sum;
  }
  __syncthreads();
}

// Between the products: sigma; and, to move on, power steps on the patterns and what goes back
// through the weights.
__device__ inline void grid_step(const View& v, const Op& op) {
  LMTFAST_SHARED(float, triangle, [kPanel * kPanel]);
  const Separable y(v, op);
  const Stencil& s = op.s;
  const int64_t entries = static_cast<int64_t>(s.rows) * s.taps * kPanel;
  // Squares of the image must neither overflow nor underflow.
  float largest = 0.0f;
  for (int64_t i = threadIdx.x; i < entries; i += kBlockThreads) {
    largest = std::fmax(largest, std::fabs(y.image[i]));
  }
  largest = Team<true>::max(largest);
  const float scale = largest > 0.0f ? largest : 1.0f;
  for (int64_t i = threadIdx.x; i < entries; i += kBlockThreads) y.image[i] /= scale;
  __syncthreads();
  const ImageOperand<true> image{y.image, s.rows, s.taps, y.rank};
  block_product(y.pairs, y.pairs, s.rows, image, image, [&](int32_t i, int32_t j, float value) {
    y.gram[static_cast<int64_t>(i) * y.pairs + j] = value;
  });
  apply_gram(y, y.patterns);
  double square = 0;
  const Windows windows{&op, y.patterns, y.rank};
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(s.outputs) * y.pairs; i += kBlockThreads) {
    square += static_cast<double>(y.grid[i]) *
              windows.at(static_cast<int32_t>(i / y.pairs), static_cast<int32_t>(i % y.pairs));
  }
  square = Team<true>::sum(square);
  if (threadIdx.x == 0) {
    // Rounding may turn zero negative; NaN passes.
    const double relative = square < 0.0 ? 0.0 : std::sqrt(square);
    y.values[0] = static_cast<double>(largest) * relative;
    y.values[1] = relative;
  }
  if (v.new_state == nullptr) return;
  for (int i = 0; i < kGridSteps; ++i) {
    if (i > 0) apply_gram(y, y.next);
    fold_grid(y, y.next);
    scale_to_unit(y.next, static_cast<int64_t>(s.inputs) * kPanel);
  }
  orthonormalise(y.next, s.inputs, y.rank, triangle);
  overlap_of(op, y.next, y.rank, y.overlap);
  // The image takes the triangle of h: triangle^T on the left of the overlap, tap by tap.
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(y.pairs) * y.pairs; i += kBlockThreads) {
    const int64_t row = i / y.pairs, column = i % y.pairs, l = row % y.rank;
    float sum = 0.0f;
    for (int k = 0; k < y.rank; ++k) {
      sum = std::fma(triangle[k * kPanel + l], y.overlap[(row - l + k) * y.pairs + column], sum);
    }
    y.gram[i] = sum;
  }
  __syncthreads();
  mix_image(op, y.image, y.gram, y.rank, y.mixed);
}

// New factors, or the old ones where the new are zero or not finite.
__device__ inline void finish_separable(const View& v, const Op& op) {
  const Separable y(v, op);
  const Stencil& s = op.s;
  // `panel` has served; its memory takes the new a.
  float* a = y.panel;
  for (int32_t i = threadIdx.x; i < s.channels * kPanel; i += kBlockThreads) {
    float sum = 0.0f;
    for (int32_t tap = 0; tap < s.taps; ++tap) {
      const int32_t column = column_of(s, op.tap_major(), i / kPanel, tap);
      sum += y.back[static_cast<int64_t>(column) * kPanel + i % kPanel];
    }
    a[i] = i % kPanel < y.rank ? sum : 0.0f;
  }
  __syncthreads();
  const double norm = scale_to_unit(a, static_cast<int64_t>(s.channels) * kPanel);
  int bad = 0;
  for (int32_t i = threadIdx.x; i < s.channels * kPanel; i += kBlockThreads) bad |= !finite(a[i]);
  for (int32_t i = threadIdx.x; i < s.inputs * kPanel; i += kBlockThreads)
    bad |= !finite(y.next[i]);
  bad = Team<true>::max(bad);
  const bool usable = norm > 0.0 && bad == 0;
  float* state = v.new_state + y.state_offset();
  const int64_t patterns = static_cast<int64_t>(s.inputs) * y.rank;
  const int64_t entries = patterns + static_cast<int64_t>(s.channels) * y.rank;
  for (int64_t i = threadIdx.x; i < entries; i += kBlockThreads) {
    const float* source = i < patterns ? y.next : a;
    const int64_t j = i < patterns ? i : i - patterns;
    state[i] = usable ? source[j / y.rank * kPanel + j % y.rank] : y.state[i];
  }
}

// Sigma and the saved vectors of the best group, the first of several.
__device__ inline void record_separable(const View& v, int32_t index) {
  const Op any(v, index, 0);
  const Stencil& s = any.s;
  const double* values = v.doubles + any.work.values;
  int winner = 0;
  for (int g = 1; g < s.groups; ++g) {
    const double best = values[2 * winner], value = values[2 * g];
    // NaN wins, and stays.
    if (value > best || (value != value && best == best)) winner = g;
  }
  const Op op(v, index, winner);
  const Separable y(v, op);
  float* group = v.saved + any.row.saved_offset;
  float* h = group + 2;
  float* a = h + static_cast<int64_t>(s.inputs) * y.rank;
  float* image = a + static_cast<int64_t>(s.channels) * y.rank;
  if (threadIdx.x == 0) {
    group[0] = static_cast<float>(winner);
    group[1] = static_cast<float>(y.values[1]);
    v.sigmas[index] = static_cast<float>(y.values[0]);
  }
  const auto copy = [&](float* to, const float* from, int64_t rows) {
    for (int64_t i = threadIdx.x; i < rows * y.rank; i += kBlockThreads) {
      to[i] = from[i / y.rank * kPanel + i % y.rank];
    }
  };
  copy(h, y.patterns, s.inputs);
  copy(a, y.plain, s.channels);
  // The image mixed by the overlap of the shifted patterns, over sigma. The first group's places serve
  // whichever has won; finish_separable of another block reads neither.
  float* overlap = v.floats + any.work.saved_overlap;
  float* mixed = v.floats + any.work.saved_mixed;
  overlap_of(op, y.patterns, y.rank, overlap);
  mix_image(op, y.image, overlap, y.rank, mixed);
  const float sigma = static_cast<float>(y.values[1]);
  const float inverse = sigma > 0.0f ? 1.0f / sigma : 1.0f;
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(s.rows) * s.taps * y.rank;
       i += kBlockThreads) {
    image[i] = mixed[i / y.rank * kPanel + i % y.rank] * inverse;
  }
}

}  // namespace lmtfast::cuda
