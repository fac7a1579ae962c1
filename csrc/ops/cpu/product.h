// SPDX-License-Identifier: MIT
// Blocked product of two matrices that functions pack, handed to a function in blocks.
//
// It runs over groups of columns (a task each), rows in groups, depth in blocks of kDepth, then
// register tiles. The left factor is packed once for all tasks, the right one once per task; a group
// of results is handed out while it is in the cache. Every sum has an order that no thread changes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/buffer.h"
#include "core/parallel.h"

namespace lmtfast {

// Left panels are (depth, rows), right ones (depth, columns), zero past the end of their matrix.
struct ProductTile {
  int64_t rows, columns;
  // sums (rows, columns) of the given stride += a b; `next` is the a that follows.
  void (*accumulate)(int64_t depth, const float* a, const float* b, float* sums, int64_t stride,
                     const float* next);
};

constexpr int64_t kColumnGroup = 96;  // a multiple of every panel
constexpr int64_t kPanelGroup = 8;    // left panels that one task packs
constexpr int64_t kMaxColumns = 768;
constexpr int64_t kPackedGroup = 1 << 18;  // floats of a packed group of columns, half a cache
constexpr int64_t kSumsGroup = 3 << 15;    // floats of the sums of a group
constexpr int64_t kDepth = 256;            // of a panel of 32 columns: 32 KB, the nearest cache

inline int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// sums = A B for A (rows, depth), B (depth, columns), handed out in blocks:
//   pack_left(row, count, to), pack_right(column, count, to): panels of the full depth, in a row
//   finish(row, rows, column, columns, sums, stride)
// Rows that `needed(end of the columns)` leaves out are not multiplied.
template <class PackLeft, class PackRight, class Needed, class Finish>
void multiply(const ProductTile& tile, int64_t rows, int64_t columns, int64_t depth,
              int64_t threads, const PackLeft& pack_left, const PackRight& pack_right,
              const Needed& needed, const Finish& finish) {
  const int64_t panels = (rows + tile.rows - 1) / tile.rows;
  // The last tile fetches ahead of a panel that is not there, but in its own memory.
  Buffer<float> left((panels + 1) * tile.rows * depth);
  const int64_t group = kPanelGroup * tile.rows;
  parallel_for((rows + group - 1) / group, threads, [&](int64_t task) {
    const int64_t row = task * group;
    pack_left(row, std::min(group, rows - row), left.data() + row * depth);
  });
  // As wide as the cache allows, for a row is read and written in pieces of this width, but enough
  // groups for the threads. No result depends on it.
  const int64_t shared = round_up(columns / (2 * threads) + 1, kColumnGroup);
  const int64_t cached = kPackedGroup / depth / kColumnGroup * kColumnGroup;
  const int64_t width = std::clamp(std::min(shared, cached), kColumnGroup, kMaxColumns);
  const int64_t height = round_up(std::min(rows, kSumsGroup / width), tile.rows);
  const int64_t tasks = (columns + width - 1) / width;
  const int64_t workers = std::min(threads, tasks);
  Buffer<float> right(workers * width * depth);
  Buffer<float> sums(workers * width * height);
  // A worker takes every workers-th group of columns, so its buffers have one user.
  parallel_for(workers, workers, [&](int64_t worker) {
    float* packed = right.data() + worker * width * depth;
    float* total = sums.data() + worker * width * height;
    for (int64_t task = worker; task < tasks; task += workers) {
      const int64_t begin = task * width;
      const int64_t end = std::min(begin + width, columns);
      pack_right(begin, end - begin, packed);
      const int64_t stop = needed(end);
      for (int64_t i = 0; i < stop; i += height) {
        const int64_t last = std::min(i + height, stop);
        std::fill(total, total + width * round_up(last - i, tile.rows), 0.0f);
        for (int64_t f = 0; f < depth; f += kDepth) {
          const int64_t block = std::min(kDepth, depth - f);
          for (int64_t j = begin; j < end; j += tile.columns) {
            const float* b = packed + (j - begin) * depth + f * tile.columns;
            for (int64_t r = i; r < last; r += tile.rows) {
              const float* a = left.data() + r * depth + f * tile.rows;
              tile.accumulate(block, a, b, total + (r - i) * width + (j - begin), width,
                              a + tile.rows * depth);
            }
          }
        }
        finish(i, last - i, begin, end - begin, total, width);
      }
    }
  });
}

}  // namespace lmtfast
