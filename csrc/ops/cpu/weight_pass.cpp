// SPDX-License-Identifier: MIT
// Register blocks of the products, one set per instruction set. Compiled with contraction, so that
// the products fuse where the target can.
#include "ops/cpu/weight_pass.h"

#include <cstring>

#include "core/vector_math.h"

namespace lmtfast::cpu {
namespace {

using Bfloat16 = uint16_t;  // its bits

// `lanes` floats that the compiler keeps in registers; one where it has no vector types.
template <int lanes>
struct Simd;
template <>
struct Simd<1> {
  using Vector = float;
};
#if defined(__GNUC__) || defined(__clang__)
#define LMTFAST_SIMD(lanes)                                          \
  template <>                                                        \
  struct Simd<lanes> {                                               \
    typedef float Vector __attribute__((vector_size(4 * lanes)));    \
    typedef uint32_t Bits __attribute__((vector_size(4 * lanes)));   \
    typedef Bfloat16 Halves __attribute__((vector_size(2 * lanes))); \
  }
LMTFAST_SIMD(4);
LMTFAST_SIMD(8);
LMTFAST_SIMD(16);
#endif

// Vectors are passed by reference: by value their calling convention would depend on the target.
template <int lanes>
LMTFAST_INLINE void load(const float* from, typename Simd<lanes>::Vector& to) {
  std::memcpy(&to, from, sizeof(to));
}

template <int lanes>
LMTFAST_INLINE void load(const Bfloat16* from, typename Simd<lanes>::Vector& to) {
  if constexpr (lanes == 1) {
    const uint32_t bits = static_cast<uint32_t>(*from) << 16;
    std::memcpy(&to, &bits, sizeof(to));
  } else {
    typename Simd<lanes>::Halves halves;
    std::memcpy(&halves, from, sizeof(halves));
    const auto bits = __builtin_convertvector(halves, typename Simd<lanes>::Bits) << 16;
    std::memcpy(&to, &bits, sizeof(to));
  }
}

// Blocks that are summed before they join a row's total, so that a long sum keeps its digits and a
// stretch of the panel stays in the first cache for all rows.
constexpr int64_t kChunk = 32;

template <class T>
LMTFAST_INLINE void fetch([[maybe_unused]] const T* at) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(at, 0, 2);
#endif
}

// Leaves a vector where it is: the compiler would read it again for every product.
template <class Vector>
LMTFAST_INLINE void hold([[maybe_unused]] Vector& x) {
#if LMTFAST_X86_CLONES && !defined(__clang__)
  if constexpr (sizeof(Vector) > 16) asm("" : "+v"(x));
#endif
}

// Blocks [begin, end) of `height` rows against all columns, added to totals[row][column][lane];
// meanwhile as many of the rows from `ahead` on are fetched; some may be past the end of memory.
template <int lanes, class T, int height>
LMTFAST_INLINE void multiply_tile(const T* weights, int64_t stride, int64_t begin, int64_t end,
                                  const float* panel, const T* ahead, float* totals) {
  using Vector = typename Simd<lanes>::Vector;
  Vector sum[height][kPanelColumns];
#pragma GCC unroll 8
  for (int r = 0; r < height; ++r) {
#pragma GCC unroll 8
    for (int k = 0; k < kPanelColumns; ++k) sum[r][k] = Vector{};
  }
  for (int64_t b = begin; b < end; ++b) {
#pragma GCC unroll 8
    for (int r = 0; r < height; ++r) fetch(ahead + r * stride + (b - begin) * kBlock);
#pragma GCC unroll 8
    for (int s = 0; s < kBlock; s += lanes) {
      Vector w[height];
#pragma GCC unroll 8
      for (int r = 0; r < height; ++r) load<lanes>(weights + r * stride + b * kBlock + s, w[r]);
#pragma GCC unroll 8
      for (int k = 0; k < kPanelColumns; ++k) {
        Vector z;
        load<lanes>(panel + b * kPanelBlock + k * kBlock + s, z);
        hold(z);
#pragma GCC unroll 8
        for (int r = 0; r < height; ++r) sum[r][k] += w[r] * z;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < height; ++r) {
#pragma GCC unroll 8
    for (int k = 0; k < kPanelColumns; ++k) {
      float* total = totals + (r * kPanelColumns + k) * lanes;
      Vector t;
      std::memcpy(&t, total, sizeof(t));
      t += sum[r][k];
      std::memcpy(total, &t, sizeof(t));
    }
  }
}

// sums[i] += the sum of the `lanes` numbers at i, by halves.
template <int lanes>
LMTFAST_INLINE void add_lanes(int64_t count, const float* from, float* sums) {
  if constexpr (lanes == 1) {
    for (int64_t i = 0; i < count; ++i) sums[i] += from[i];
  } else {
    constexpr int kHalf = lanes / 2;
    alignas(64) float halves[kRowBlock * kPanelColumns * kHalf];
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 8
      for (int l = 0; l < kHalf; ++l) {
        halves[i * kHalf + l] = from[2 * i * kHalf + l] + from[(2 * i + 1) * kHalf + l];
      }
    }
    add_lanes<kHalf>(count, halves, sums);
  }
}

template <int lanes, class T, int height>
LMTFAST_INLINE void multiply_rows(const WeightRows& weights, const float* panel, float* images) {
  alignas(64) float totals[kRowBlock * kPanelColumns * lanes];
  for (int64_t i = 0; i < weights.rows * kPanelColumns * lanes; ++i) totals[i] = 0.0f;
  const T* data = static_cast<const T*>(weights.data);
  const int64_t stride = weights.stride;
  for (int64_t begin = 0; begin < weights.blocks; begin += kChunk) {
    const int64_t end = begin + kChunk < weights.blocks ? begin + kChunk : weights.blocks;
    for (int64_t r = 0; r < weights.rows;) {
      // What comes next and no more: lines that are fetched long before their use take longer.
      const int64_t later = r + height;
      const T* ahead = later < weights.rows   ? data + later * stride + begin * kBlock
                       : end < weights.blocks ? data + end * kBlock
                       : weights.next         ? static_cast<const T*>(weights.next)
                                              : data;
      float* total = totals + r * kPanelColumns * lanes;
      if (r + height <= weights.rows) {
        multiply_tile<lanes, T, height>(data + r * stride, stride, begin, end, panel, ahead, total);
        r += height;
      } else {
        multiply_tile<lanes, T, 1>(data + r * stride, stride, begin, end, panel, ahead, total);
        r += 1;
      }
    }
  }
  add_lanes<lanes>(weights.rows * kPanelColumns, totals, images);
}

// `height` vectors of the panel against all rows.
template <int lanes, class T, int height>
LMTFAST_INLINE void adjoint_tile(const WeightRows& weights, const float* coefficients, bool first,
                                 int64_t vector, float* panel) {
  using Vector = typename Simd<lanes>::Vector;
  constexpr int64_t kPerBlock = kBlock / lanes;
  const T* data = static_cast<const T*>(weights.data) + vector * lanes;
  const T* next = weights.next ? static_cast<const T*>(weights.next) + vector * lanes : data;
  float* at[height];
#pragma GCC unroll 8
  for (int j = 0; j < height; ++j) {
    at[j] = panel + (vector + j) / kPerBlock * kPanelBlock + (vector + j) % kPerBlock * lanes;
  }
  Vector sum[height][kPanelColumns];
#pragma GCC unroll 8
  for (int j = 0; j < height; ++j) {
#pragma GCC unroll 8
    for (int k = 0; k < kPanelColumns; ++k) {
      if (first) {
        sum[j][k] = Vector{};
      } else {
        load<lanes>(at[j] + k * kBlock, sum[j][k]);
      }
    }
  }
  for (int64_t r = 0; r < weights.rows; ++r) {
    Vector w[height];
#pragma GCC unroll 8
    for (int j = 0; j < height; ++j) load<lanes>(data + r * weights.stride + j * lanes, w[j]);
    // Memory would be idle here: half of what multiply reads next. All of it would be more than
    // arrives meanwhile, and other loads would wait.
    if (r % 2 == 0) {
#pragma GCC unroll 8
      for (int j = 0; j < height; ++j) fetch(next + r * weights.stride + j * lanes);
    }
#pragma GCC unroll 8
    for (int k = 0; k < kPanelColumns; ++k) {
      const float c = coefficients[r * kPanelColumns + k];
#pragma GCC unroll 8
      for (int j = 0; j < height; ++j) sum[j][k] += w[j] * c;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < height; ++j) {
#pragma GCC unroll 8
    for (int k = 0; k < kPanelColumns; ++k) {
      std::memcpy(at[j] + k * kBlock, &sum[j][k], sizeof(Vector));
    }
  }
}

template <int lanes, class T, int height>
LMTFAST_INLINE void adjoint_rows(const WeightRows& weights, const float* coefficients, bool first,
                                 float* panel) {
  const int64_t vectors = weights.blocks * (kBlock / lanes);
  int64_t v = 0;
  for (; v + height <= vectors; v += height) {
    adjoint_tile<lanes, T, height>(weights, coefficients, first, v, panel);
  }
  for (; v < vectors; ++v) adjoint_tile<lanes, T, 1>(weights, coefficients, first, v, panel);
}

// Rows per register block: accumulators, one vector per row and one of the panel fill
// 32 registers, or 16.
#define LMTFAST_PASS(name, attributes, lanes, height)                                              \
  template <class T>                                                                               \
  attributes void multiply_##name(const WeightRows& weights, const float* panel, float* images) {  \
    multiply_rows<lanes, T, height>(weights, panel, images);                                       \
  }                                                                                                \
  template <class T>                                                                               \
  attributes void adjoint_##name(const WeightRows& weights, const float* coefficients, bool first, \
                                 float* panel) {                                                   \
    adjoint_rows<lanes, T, height>(weights, coefficients, first, panel);                           \
  }                                                                                                \
  template <class T>                                                                               \
  constexpr WeightPass k##name{multiply_##name<T>, adjoint_##name<T>};

#if defined(__GNUC__) || defined(__clang__)
LMTFAST_PASS(baseline, , 4, 2)
#else
LMTFAST_PASS(baseline, , 1, 1)
#endif
#if LMTFAST_X86_CLONES
LMTFAST_PASS(avx2, __attribute__((target("avx2,fma"))), 8, 3)
LMTFAST_PASS(avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma"))), 16, 6)
#endif

template <class T>
const WeightPass& pass_of(Isa isa) {
#if LMTFAST_X86_CLONES
  if (isa == Isa::kAvx512) return kavx512<T>;
  if (isa == Isa::kAvx2) return kavx2<T>;
#endif
  (void)isa;
  return kbaseline<T>;
}

}  // namespace

const WeightPass& weight_pass(int64_t dtype, Isa isa) {
  return dtype == LMTFAST_BFLOAT16 ? pass_of<Bfloat16>(isa) : pass_of<float>(isa);
}

}  // namespace lmtfast::cpu
