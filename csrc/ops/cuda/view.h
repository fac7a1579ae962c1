// SPDX-License-Identifier: MIT
// What the kernels of a call see: tables, tensors, workspace. Passed by value.
#pragma once

#include <type_traits>

#include "core/device.h"
#include "ops/cuda/plan.h"
#include "ops/cuda/team.h"

namespace lmtfast::cuda {

// An address with what else a kernel must know of a tensor, in the bits that no address uses.
constexpr int kBfloat16Bit = 60;
constexpr int kTapMajorBit = 61;
constexpr int kSingleBit = 62;
constexpr uint64_t kAddressMask = (uint64_t{1} << kBfloat16Bit) - 1;

inline uint64_t tensor_word(const lmtfast_tensor& t) {
  return reinterpret_cast<uint64_t>(t.data) |
         static_cast<uint64_t>(t.dtype == LMTFAST_BFLOAT16) << kBfloat16Bit |
         static_cast<uint64_t>(t.tap_major != 0) << kTapMajorBit |
         static_cast<uint64_t>(t.size == 1) << kSingleBit;
}

// Tensors of a call travel as an argument of the launch that needs them, so that a captured graph
// holds a copy of its own.
template <int kCapacity>
struct Words {
  uint64_t word[kCapacity];
};
// Room for most networks; the other size serves up to kMaxTensors.
constexpr int kFewTensors = 224;

template <int kCapacity>
Words<kCapacity> words_of(const uint64_t* from, int64_t count) {
  Words<kCapacity> words = {};
  for (int64_t i = 0; i < count; ++i) words.word[i] = from[i];
  return words;
}

// Calls body with the capacity as a compile-time constant.
template <class Body>
void with_capacity(int64_t tensors, const Body& body) {
  if (tensors <= kFewTensors) {
    body(std::integral_constant<int, kFewTensors>());
  } else {
    body(std::integral_constant<int, kMaxTensors>());
  }
}

LMTFAST_HD bool has_bit(uint64_t word, int bit) { return word >> bit & 1u; }

template <class T>
LMTFAST_HD T* address_of(uint64_t word) {
  return reinterpret_cast<T*>(word & kAddressMask);
}

struct View {
  const OpRow* rows;
  const lmtfast_scale_row* scales;
  const OpWork* work;
  const Item* items;
  const uint64_t* tensors;
  double* doubles;
  float* floats;
  int* counters;
  const float* state;
  float* new_state;  // null: sigma is read, nothing moves
  float* sigmas;
  float* saved;
  const float* grad_sigmas;
  float* grad_scales;
  const Circle* circles;
  const Item* sums;  // of circles
  const Item* slots;
  int64_t n_rows, n_scales, n_tensors, n_counters;
};

// One operator as a block sees it. The stencil stays in memory: in registers it would cost a kernel
// half of its occupancy.
struct Op {
  const OpRow& row;
  const OpWork& work;
  const Stencil& s;
  uint64_t weight;
  const float* row_scale;     // of the group, or null
  const float* column_scale;  // of the group, or null
  int32_t group;

  __device__ Op(const View& v, int32_t op, int32_t g)
      : row(v.rows[op]),
        work(v.work[op]),
        s(work.stencil),
        weight(v.tensors[v.rows[op].weight_slot]),
        row_scale(row.row_scale < 0 ? nullptr
                                    : v.saved + row.row_scale + static_cast<int64_t>(g) * s.rows),
        column_scale(row.column_scale < 0
                         ? nullptr
                         : v.saved + row.column_scale + static_cast<int64_t>(g) * s.channels),
        group(g) {}

  __device__ bool tap_major() const { return has_bit(weight, kTapMajorBit); }
  __device__ float rs(int32_t o) const { return row_scale == nullptr ? 1.0f : row_scale[o]; }
  __device__ float cs(int32_t c) const { return column_scale == nullptr ? 1.0f : column_scale[c]; }
  __device__ float identity() const { return static_cast<float>(row.identity); }
  // First weight of the group.
  __device__ int64_t first_weight() const {
    return static_cast<int64_t>(group) * s.rows * s.columns;
  }
  __device__ float weight_at(int64_t i) const {
    return has_bit(weight, kBfloat16Bit) ? widen(address_of<const bfloat16>(weight)[i])
                                         : address_of<const float>(weight)[i];
  }
};

// Inverse of a norm, 1 where it is 0. Norms are sums of squares in double, which neither overflow
// nor underflow; the inverse of a subnormal one would, and NaN must come through.
__device__ inline float inverse_or_one(double norm) {
  constexpr double kLargest = 3e38;
  const double inverse = norm == 0.0 ? 1.0 : 1.0 / norm;
  return static_cast<float>(inverse > kLargest ? kLargest : inverse);
}

__device__ inline bool finite(float x) { return x - x == 0.0f; }

// The sum of `count` numbers, the same in every block that asks: one tree over the whole block.
__device__ inline double block_sum_of(const double* values, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += values[i];
  return Team<true>::sum(sum);
}

}  // namespace lmtfast::cuda
