// SPDX-License-Identifier: MIT
// The pass of the symbol engine and of matrices, and the image of separable operators beside it, so
// that a network of both takes one launch. Floor: the weights once, 4 or 2 bytes each, at eight fused
// multiply-adds per weight for two candidates and four for one or a matrix.
#include <bit>
#include <cmath>

#include "ops/cuda/pass.h"
#include "ops/cuda/separable_product.h"
#include "ops/cuda/spectral.h"
#include "ops/cuda/symbol.h"
#include "ops/cuda/word.h"

namespace lmtfast::cuda {
namespace {

constexpr int kWarps = kPassThreads / kWarpSize;

// A row of a panel.
template <int kColumns>
struct alignas(kColumns * sizeof(float)) Piece {
  float v[kColumns];
};

// The columns of the weights in the order of memory, and z of each: x, e and where the phases of x
// begin, in shared or global memory (pass.h has what lies where).
template <int kColumns>
struct Factors {
  const float* data;
  int32_t pitch, taps, columns, count;  // count: of what neighbours in memory
  bool tap_major;

  __device__ Factors(const float* data_, const Op& op)
      : data(data_),
        pitch(
            static_cast<int32_t>(vector_pitch(static_cast<int64_t>(op.s.phases) * op.s.channels))),
        taps(op.s.taps),
        columns(op.s.columns),
        count(op.tap_major() ? op.s.channels : op.s.taps),
        tap_major(op.tap_major()) {}

  // Pieces are counted in 32 bits: there are fewer than 2^30.
  __device__ void load(int32_t slow, int32_t fast, float (&z)[kColumns]) const {
    const auto* x = reinterpret_cast<const Piece<kColumns>*>(data);
    const auto* e = x + 4 * pitch;
    const int32_t tap = tap_major ? slow : fast, channel = tap_major ? fast : slow;
    const int32_t begin = std::bit_cast<int32_t>(data[(4 * pitch + taps) * kColumns + tap]);
    const int32_t entry = begin + channel;
    const Piece<kColumns> a = x[(entry & 3) * pitch + (entry >> 2)], b = e[tap];
    LMTFAST_UNROLL
    for (int c = 0; c < kColumns; c += 2) {
      z[c] = std::fma(b.v[c], a.v[c], -(b.v[c + 1] * a.v[c + 1]));
      z[c + 1] = std::fma(b.v[c], a.v[c + 1], b.v[c + 1] * a.v[c]);
    }
  }
};

template <class T, int kColumns>
__device__ void add_image(const Factors<kColumns>& factors, int32_t column, const Rows& words,
                          float (&sum)[kPassRows * kColumns]) {
  // Where the columns lie is worked out anew for every four rows: kept, it would fill the registers.
  LMTFAST_OPAQUE(column);
  int32_t slow = column / factors.count, fast = column - slow * factors.count;
  LMTFAST_UNROLL
  for (int i = 0; i < kPerWord<T>; ++i) {
    if (column + i < factors.columns) {
      float z[kColumns];
      factors.load(slow, fast, z);
      LMTFAST_UNROLL
      for (int r = 0; r < kPassRows; ++r) {
        const float w = entry_of<T>(words[r], i);
        LMTFAST_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          sum[r * kColumns + c] = std::fma(w, z[c], sum[r * kColumns + c]);
        }
      }
    }
    if (++fast == factors.count) {
      fast = 0;
      ++slow;
    }
  }
}

// This thread's accumulators of one word: body(piece, entry of the word).
template <class T, int kColumns, class Body>
__device__ void for_each_sum(float* sums, const RowWords<T>& words, int32_t k, const Body& body) {
  auto* piece = reinterpret_cast<Piece<kColumns>*>(sums) +
                static_cast<int64_t>(k) * kPassThreads * kPerWord<T> + threadIdx.x;
  int32_t width = words.width(k);
  LMTFAST_OPAQUE(width);
  LMTFAST_UNROLL
  for (int i = 0; i < kPerWord<T>; ++i) {
    auto& place = piece[i * width];
    LMTFAST_ALIGNED(&place, sizeof(place));
    body(place, i);
  }
}

template <class T, int kColumns>
__device__ void add_back(float* sums, const RowWords<T>& words, int32_t k, const Rows& rows,
                         const float (&y)[kPassRows * kColumns]) {
  for_each_sum<T, kColumns>(sums, words, k, [&](Piece<kColumns>& place, int i) {
    Piece<kColumns> piece = place;
    LMTFAST_UNROLL
    for (int r = 0; r < kPassRows; ++r) {
      const float w = entry_of<T>(rows[r], i);
      LMTFAST_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        piece.v[c] = std::fma(w, y[r * kColumns + c], piece.v[c]);
      }
    }
    place = piece;
  });
}

// Sums over the warp; lane l gets that of number l modulo kCount.
template <int kCount>
__device__ float sum_over_warp(float (&values)[kCount]) {
  float sum = scattered_sum<kCount / 2>(values);
  LMTFAST_UNROLL
  for (int bits = kCount; bits < kWarpSize; bits *= 2) sum += __shfl_xor_sync(kAllLanes, sum, bits);
  return sum;
}

constexpr int kMostSums = kPassRows * kPassColumns;
static_assert(kMostSums <= kWarpSize);
using Exchange = float[kWarps][kMostSums];

__device__ inline Exchange& warp_sums(int parity) {
  LMTFAST_SHARED(float, parts, [2][kWarps][kMostSums]);
  return parts[parity];
}
__device__ inline float* warp_rows() {
  LMTFAST_SHARED(float, rows, [kWarps][kMostSums]);
  return rows[Team<false>::number()];
}

// 2^e for e in [-126, 127].
__device__ inline float power_of_two(int e) {
  return std::bit_cast<float>(static_cast<uint32_t>(e + 127) << 23);
}

// Exponent of a tile: at least that of the largest entry so far, so that scaled entries stay below 4.
struct Exponent {
  static constexpr int kLowest = -126, kHighest = 126;
  int e = kLowest;
  bool started = false;

  // Takes note of an entry; returns the power that scales what was added before.
  __device__ float follow(float largest) {
    // Neither zero nor what is not finite says anything about the scale.
    if (!(largest > 0.0f) || !finite(largest)) return 1.0f;
    int now = static_cast<int>(std::bit_cast<uint32_t>(largest) >> 23 & 255u) - 127;
    now = now < kLowest ? kLowest : now > kHighest ? kHighest : now;
    if (started && now <= e) return 1.0f;
    const int step = started ? e - now : 0;
    started = true;
    e = now;
    return step < kLowest ? 0.0f : power_of_two(step);
  }
};

// What the identity adds to row o of the image, in column c of the panel.
__device__ float identity_entry(const View& v, const Op& op, int32_t o, int c) {
  if (static_cast<Method>(op.work.method) == Method::kSymbol) {
    return symbol_identity(Symbol(v, op), o, c);
  }
  return c == 0 ? v.floats[op.work.plain + o] : 0.0f;
}

// Not a call, which would put what it gets on a stack.
template <class T, int kColumns>
__device__ __forceinline__ void pass_rows(const View& v, const Item& item, float* shared) {
  // Each instance reads the operator anew: what several had in common would stay in registers.
  int32_t index = item.op;
  LMTFAST_OPAQUE(index);
  const Op op(v, index, item.group);
  constexpr int kSums = kPassRows * kColumns;
  const Stencil& s = op.s;
  const OpWork& w = op.work;
  const PassShape& shape = w.pass;
  const int lane = Team<false>::rank(), warp = Team<false>::number();
  const auto subsets = static_cast<int32_t>(shape.subsets);
  const int32_t subset = item.tile % subsets, tile = item.tile / subsets;
  // Worked out again where results go: kept, they would fill the registers.
  const auto block = [&] { return static_cast<int64_t>(item.group) * item.tiles + item.tile; };
  const auto partial = [&] { return v.floats + w.partial + block() * shape.padded * kColumns; };

  const float* vector = v.floats + w.panel + (item.group * subsets + subset) * shape.vector;
  float* sums = partial();
  if (shape.shared_vector) {
    for (int64_t i = threadIdx.x; i < shape.vector; i += kPassThreads) shared[i] = vector[i];
    vector = shared;
    shared += shape.vector;
  }
  if (shape.shared_sums) sums = shared;
  const Factors<kColumns> factors(vector, op);
  const RowWords<T> words(s.columns);
  const T* weights = address_of<const T>(op.weight) + op.first_weight();
  const Source<T> source{
      weights, s.columns,
      reinterpret_cast<uintptr_t>(weights) % kWordBytes == 0 && s.columns % kPerWord<T> == 0};
  const bool update = v.new_state != nullptr;
  if (update) {
    for (int32_t k = 0; k < words.mine; ++k) {
      for_each_sum<T, kColumns>(sums, words, k, [](auto& piece, int) { piece = {}; });
    }
  }
  const auto row_begin = static_cast<int32_t>(tile * shape.rows);
  const int32_t row_end =
      s.rows - row_begin < shape.rows ? s.rows : row_begin + static_cast<int32_t>(shape.rows);
  Word held[kHeldWords<T>][kPassRows];
  LMTFAST_UNROLL
  for (int k = 0; k < kHeldWords<T>; ++k) {
    if (k < words.mine) source.load(row_begin, row_end, words.column(k), held[k]);
  }
  Exponent exponent;
  double square = 0;
  __syncthreads();
  LMTFAST_ROLL
  for (int32_t row = row_begin; row < row_end; row += kPassRows) {
    // What a lane needs of its row is on its way while the block multiplies.
    const int32_t o = row + lane % kSums / kColumns;
    const float scale = o < row_end ? op.rs(o) : 0.0f;
    float sum[kSums] = {};
    LMTFAST_UNROLL
    for (int k = 0; k < kHeldWords<T>; ++k) {
      if (k < words.mine) add_image<T>(factors, words.column(k), held[k], sum);
    }
    LMTFAST_ROLL
    for (int32_t k = kHeldWords<T>; k < words.mine; ++k) {
      Rows more;
      source.load(row, row_end, words.column(k), more);
      add_image<T>(factors, words.column(k), more, sum);
    }
    // Two places in turn: whoever is late may still read those of the rows before.
    Exchange& parts = warp_sums((row - row_begin) / kPassRows % 2);
    const float part = sum_over_warp(sum);
    if (lane < kSums) parts[warp][lane] = part;
    __syncthreads();
    // Every warp adds them up for itself. Lane l has column l % kColumns of row l / kColumns.
    float pure = 0.0f;
    LMTFAST_UNROLL
    for (int i = 0; i < kWarps; ++i) pure += parts[i][lane % kSums];
    const int c = subset * kColumns + lane % kColumns;
    float value = 0.0f, acting = 0.0f;
    if (o < row_end) {
      const float identity = op.identity();
      value = pure * scale;
      if (identity != 0.0f && o < s.channels) value += identity * identity_entry(v, op, o, c);
      acting = value * scale;
      if (warp == 0 && lane < kSums) {
        const int64_t at = (static_cast<int64_t>(item.group) * s.rows + o) * kPassColumns + c;
        v.floats[w.pure + at] = pure;
        v.floats[w.image + at] = value;
        square += static_cast<double>(value) * static_cast<double>(value);
      }
    }
    if (update) {
      const float before = exponent.follow(Team<false>::max(std::fabs(acting)));
      if (before != 1.0f) {
        for (int32_t k = 0; k < words.mine; ++k) {
          for_each_sum<T, kColumns>(sums, words, k, [&](auto& piece, int) {
            for (float& x : piece.v) x *= before;
          });
        }
      }
      float* sent = warp_rows();
      __syncwarp();
      if (lane < kSums) sent[lane] = acting * power_of_two(-exponent.e);
      __syncwarp();
      LMTFAST_UNROLL
      for (int i = 0; i < kSums; ++i) sum[i] = sent[i];
    }
    LMTFAST_UNROLL
    for (int k = 0; k < kHeldWords<T>; ++k) {
      if (k >= words.mine) continue;
      if (update) add_back<T, kColumns>(sums, words, k, held[k], sum);
      source.load(row + kPassRows, row_end, words.column(k), held[k]);
    }
    LMTFAST_ROLL
    for (int32_t k = kHeldWords<T>; update && k < words.mine; ++k) {
      Rows more;
      source.load(row, row_end, words.column(k), more);
      add_back<T, kColumns>(sums, words, k, more, sum);
    }
  }
  if (warp == 0) {
    LMTFAST_UNROLL
    for (int bits = kColumns; bits < kSums; bits *= 2) {
      square += __shfl_xor_sync(kAllLanes, square, bits);
    }
    const int64_t place = static_cast<int64_t>(item.group) * shape.tiles + tile;
    const int64_t at = place * kPassColumns + subset * kColumns;
    if (lane < kColumns) v.doubles[w.norms + at + lane] = square;
  }
  if (!update) return;
  if (threadIdx.x == 0) v.doubles[w.powers + block()] = power_of_two(exponent.e);
  if (!shape.shared_sums) return;
  float* result = partial();
  for (int32_t k = 0; k < words.mine; ++k) {
    const float* first = sums;
    for_each_sum<T, kColumns>(sums, words, k, [&](auto& piece, int) {
      const auto at = reinterpret_cast<const float*>(&piece) - first;
      *reinterpret_cast<Piece<kColumns>*>(result + at) = piece;
    });
  }
}

template <class T>
__device__ __forceinline__ void pass_of(const View& v, const Item& item, const Op& op,
                                        float* shared) {
  if (op.work.pass.columns == kPassColumns) {
    pass_rows<T, kPassColumns>(v, item, shared);
  } else {
    pass_rows<T, 2>(v, item, shared);
  }
}

__global__ void __launch_bounds__(kPassThreads, 1) pass_kernel(View v) {
  LMTFAST_DYNAMIC_SHARED(float, shared);
  const Item item = v.items[blockIdx.x];
  if (static_cast<Method>(v.work[item.op].method) == Method::kSeparable) {
    panel_image_tile(v, Op(v, item.op, item.group), item);
    return;
  }
  const Op op(v, item.op, item.group);
  if (has_bit(op.weight, kBfloat16Bit)) {
    pass_of<bfloat16>(v, item, op, shared);
  } else {
    pass_of<float>(v, item, op, shared);
  }
}

}  // namespace

void launch_pass(const View& view, unsigned blocks, int64_t shared_bytes, Stream stream) {
  LMTFAST_LAUNCH(pass_kernel, blocks, kPassThreads, static_cast<size_t>(shared_bytes), stream,
                 view);
}

}  // namespace lmtfast::cuda
