// SPDX-License-Identifier: MIT
// Matrix product of one tile by one block of 256 threads, operands computed where they are read.
//
// A tile has 64 x 64 results, 4 x 4 per thread: rows ty + 16 a, columns tx + 16 b. The depth is
// walked in steps of 16; operands map (step, lane of the step) to their own depth, so they may order
// it as memory does. While a step is multiplied the next one is on its way in registers. Float32
// fused multiply-adds, each step summed by itself: the error is that of a sum over steps.
//
// An operand is a type with
//   static constexpr bool kDepthFast   neighbouring threads read neighbouring depths, not places
//   Place place(int32_t i) const       what is fixed for row or column i of the tile's matrix
//   float at(const Place&, int32_t step, int32_t lane) const
#pragma once

#include "ops/cuda/view.h"

namespace lmtfast::cuda {

constexpr int kTileThreads = 256;
constexpr int kTileThreadSide = 16;
constexpr int kTilePer = 4;
static_assert(kTileThreads == kBlockThreads && kTileSide == kTileThreadSide * kTilePer);

using TileSum = float[kTilePer][kTilePer];

__device__ inline int32_t tile_row(int a) {
  return static_cast<int32_t>(threadIdx.x) / kTileThreadSide + a * kTileThreadSide;
}
__device__ inline int32_t tile_column(int b) {
  return static_cast<int32_t>(threadIdx.x) % kTileThreadSide + b * kTileThreadSide;
}

// One thread's share of loading an operand's step: four elements.
template <class Operand>
struct TileLoader {
  static constexpr int kPlaces = Operand::kDepthFast ? kTilePer : 1;
  typename Operand::Place places[kPlaces];
  float next[kTilePer];

  static __device__ int32_t index(int i) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    return Operand::kDepthFast ? thread / kTileStep + i * (kTileThreads / kTileStep)
                               : thread % kTileSide;
  }
  static __device__ int32_t lane(int i) {
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    return Operand::kDepthFast ? thread % kTileStep
                               : thread / kTileSide + i * (kTileThreads / kTileSide);
  }

  __device__ TileLoader(const Operand& operand, int32_t first) {
    LMTFAST_UNROLL
    for (int i = 0; i < kPlaces; ++i) places[i] = operand.place(first + index(i));
  }
  __device__ void fetch(const Operand& operand, int32_t step) {
    LMTFAST_UNROLL
    for (int i = 0; i < kTilePer; ++i) {
      next[i] = operand.at(places[Operand::kDepthFast ? i : 0], step, lane(i));
    }
  }
  __device__ void put(float (*tile)[kTilePitch]) const {
    LMTFAST_UNROLL
    for (int i = 0; i < kTilePer; ++i) tile[lane(i)][index(i)] = next[i];
  }
};

using TileStep = float[kTileStep][kTilePitch];
static_assert(2 * sizeof(TileStep) == kTileBytes);

// Adds one step's products. kAll: the tile lies inside its matrix; otherwise rows and columns beyond
// it are left out by sixteens, which is most of the work of a small matrix.
template <bool kAll>
__device__ void multiply_step(const TileStep& rows, const TileStep& columns, int32_t rows_left,
                              int32_t columns_left, TileSum& sum) {
  TileSum part = {};
  LMTFAST_UNROLL
  for (int k = 0; k < kTileStep; ++k) {
    float l[kTilePer], r[kTilePer];
    LMTFAST_UNROLL
    for (int a = 0; a < kTilePer; ++a) l[a] = rows[k][tile_row(a)];
    LMTFAST_UNROLL
    for (int b = 0; b < kTilePer; ++b) r[b] = columns[k][tile_column(b)];
    LMTFAST_UNROLL
    for (int a = 0; a < kTilePer; ++a) {
      if (!kAll && a * kTileThreadSide >= rows_left) break;
      LMTFAST_UNROLL
      for (int b = 0; b < kTilePer; ++b) {
        if (!kAll && b * kTileThreadSide >= columns_left) break;
        part[a][b] = std::fma(l[a], r[b], part[a][b]);
      }
    }
  }
  LMTFAST_UNROLL
  for (int a = 0; a < kTilePer; ++a) {
    LMTFAST_UNROLL
    for (int b = 0; b < kTilePer; ++b) sum[a][b] += part[a][b];
  }
}

// The step that is multiplied: of rows, then of columns. One place for all products of a kernel, the
// dynamic shared memory, which the pass has for other blocks anyway.
__device__ inline TileStep& tile_step(int which) {
  LMTFAST_DYNAMIC_SHARED(TileStep, steps);
  return steps[which];
}

// sum[a][b] = product of row0 + tile_row(a) and column0 + tile_column(b), of a matrix (rows,
// columns). All threads of the block must call; operands return 0 outside their matrix.
template <class Left, class Right>
__device__ void tile_product(const Left& left, const Right& right, int32_t row_count,
                             int32_t column_count, int32_t row0, int32_t column0, int32_t steps,
                             TileSum& sum) {
  TileStep &rows = tile_step(0), &columns = tile_step(1);
  TileLoader<Left> row_loader(left, row0);
  TileLoader<Right> column_loader(right, column0);
  LMTFAST_UNROLL
  for (int a = 0; a < kTilePer; ++a) {
    LMTFAST_UNROLL
    for (int b = 0; b < kTilePer; ++b) sum[a][b] = 0.0f;
  }
  if (steps > 0) {
    row_loader.fetch(left, 0);
    column_loader.fetch(right, 0);
  }
  LMTFAST_ROLL
  for (int32_t step = 0; step < steps; ++step) {
    // Whoever still reads the step before.
    __syncthreads();
    row_loader.put(rows);
    column_loader.put(columns);
    __syncthreads();
    if (step + 1 < steps) {
      row_loader.fetch(left, step + 1);
      column_loader.fetch(right, step + 1);
    }
    const int32_t rows_left = row_count - row0, columns_left = column_count - column0;
    if (rows_left >= kTileSide && columns_left >= kTileSide) {
      multiply_step<true>(rows, columns, rows_left, columns_left, sum);
    } else {
      multiply_step<false>(rows, columns, rows_left, columns_left, sum);
    }
  }
}

// The tile in shared memory, for the whole block: an epilogue walks it in the order of memory.
using SharedTile = float[kTileSide][kTileSide + 1];

__device__ inline const SharedTile& share_tile(const TileSum& sum) {
  LMTFAST_SHARED(float, tile, [kTileSide][kTileSide + 1]);
  LMTFAST_UNROLL
  for (int a = 0; a < kTilePer; ++a) {
    LMTFAST_UNROLL
    for (int b = 0; b < kTilePer; ++b) tile[tile_row(a)][tile_column(b)] = sum[a][b];
  }
  __syncthreads();
  return tile;
}

// Calls body(row of the tile, column, value), neighbouring threads on neighbouring columns.
template <class Body>
__device__ void for_each_entry(const SharedTile& tile, const Body& body) {
  LMTFAST_ROLL
  for (int32_t i = threadIdx.x; i < kTileSide * kTileSide; i += kTileThreads) {
    body(i / kTileSide, i % kTileSide, tile[i / kTileSide][i % kTileSide]);
  }
}

LMTFAST_HD int32_t tiles_of(int64_t length) {
  return static_cast<int32_t>((length + kTileSide - 1) / kTileSide);
}
LMTFAST_HD int32_t steps_of(int64_t depth) {
  return static_cast<int32_t>((depth + kTileStep - 1) / kTileStep);
}

// All tiles of a product by one block: store(row, column, value) for every entry.
template <class Left, class Right, class Store>
__device__ void block_product(int32_t rows, int32_t columns, int32_t depth, const Left& left,
                              const Right& right, const Store& store) {
  for (int32_t row0 = 0; row0 < rows; row0 += kTileSide) {
    for (int32_t column0 = 0; column0 < columns; column0 += kTileSide) {
      TileSum sum;
      tile_product(left, right, rows, columns, row0, column0, steps_of(depth), sum);
      LMTFAST_UNROLL
      for (int a = 0; a < kTilePer; ++a) {
        LMTFAST_UNROLL
        for (int b = 0; b < kTilePer; ++b) {
          const int32_t row = row0 + tile_row(a), column = column0 + tile_column(b);
          if (row < rows && column < columns) store(row, column, sum[a][b]);
        }
      }
    }
  }
  // Results are for the whole block.
  __syncthreads();
}

}  // namespace lmtfast::cuda
