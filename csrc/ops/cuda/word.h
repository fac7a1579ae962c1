// SPDX-License-Identifier: MIT
// Rows of weights in 16-byte words, and which thread of a block owns which.
#pragma once

#include <bit>

#include "ops/cuda/pass.h"
#include "ops/cuda/view.h"

namespace lmtfast::cuda {

struct alignas(kWordBytes) Word {
  uint32_t bits[4];
};
template <class T>
constexpr int kPerWord = kWordBytes / static_cast<int>(sizeof(T));

template <class T>
__device__ inline float entry_of(const Word& word, int i) {
  if constexpr (sizeof(T) == 4) {
    return std::bit_cast<float>(word.bits[i]);
  } else {
    const uint32_t pair = word.bits[i / 2];
    return std::bit_cast<float>(i % 2 == 0 ? pair << 16 : pair & 0xFFFF0000u);
  }
}

// The word at `from`, of which `left` entries exist; whole words where rows are aligned. Weights are
// read once: they need not stay in a cache.
template <class T>
__device__ Word load_word(const T* from, int32_t left, bool aligned) {
  if (aligned) {
    LMTFAST_ALIGNED(from, kWordBytes);
#if defined(__CUDA_ARCH__)
    const uint4 word = __ldcs(reinterpret_cast<const uint4*>(from));
    return {{word.x, word.y, word.z, word.w}};
#else
    return *reinterpret_cast<const Word*>(from);
#endif
  }
  Word word = {};
  LMTFAST_UNROLL
  for (int i = 0; i < kPerWord<T>; ++i) {
    if (i >= left) continue;
    if constexpr (sizeof(T) == 4) {
      word.bits[i] = std::bit_cast<uint32_t>(from[i]);
    } else {
      word.bits[i / 2] |= static_cast<uint32_t>(from[i].bits) << (i % 2 * 16);
    }
  }
  return word;
}

// A row's words as the threads own them: word k of a thread is word k * kPassThreads + thread.
template <class T>
struct RowWords {
  int32_t columns, mine;

  __device__ explicit RowWords(int32_t columns_) : columns(columns_) {
    const int32_t all = (columns + kPerWord<T> - 1) / kPerWord<T>;
    mine = (all - static_cast<int32_t>(threadIdx.x) + kPassThreads - 1) / kPassThreads;
    if (mine < 0) mine = 0;
  }
  __device__ int32_t column(int32_t k) const {
    return (k * kPassThreads + static_cast<int32_t>(threadIdx.x)) * kPerWord<T>;
  }
  __device__ int32_t width(int32_t k) const {
    const int32_t left = (columns + kPerWord<T> - 1) / kPerWord<T> - k * kPassThreads;
    return left < kPassThreads ? left : kPassThreads;
  }
};

using Rows = Word[kPassRows];
template <class T>
constexpr int kHeldWords = kHeldColumns / kPassThreads / kPerWord<T>;

template <class T>
struct Source {
  const T* weights;  // of the group
  int32_t columns;
  bool aligned;

  // Four rows of the word at `column`; zero beyond row `end`.
  __device__ void load(int32_t row, int32_t end, int32_t column, Rows& words) const {
    LMTFAST_UNROLL
    for (int r = 0; r < kPassRows; ++r) {
      words[r] = {};
      if (row + r >= end) continue;
      words[r] = load_word(weights + static_cast<int64_t>(row + r) * columns + column,
                           columns - column, aligned);
    }
  }
};

}  // namespace lmtfast::cuda
