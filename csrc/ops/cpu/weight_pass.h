// SPDX-License-Identifier: MIT
// Products of weight rows with a few columns, for engines that read each weight once.
//
// A panel holds kPanelColumns columns, as long as a weight row and padded with zeros to whole blocks
// of kBlock entries: panel[block][column][entry]. Both products then walk a row and the panel in
// step, and a row that is still in the cache serves both.
#pragma once

#include <cstdint>

#include "core/dispatch.h"

namespace lmtfast::cpu {

constexpr int kBlock = 16;
constexpr int kPanelColumns = 8;
constexpr int kPanelBlock = kBlock * kPanelColumns;
// Rows of one call.
constexpr int kRowBlock = 24;

inline int64_t blocks_of(int64_t entries) { return (entries + kBlock - 1) / kBlock; }

// Weight rows, `stride` entries apart, of whole blocks.
struct WeightRows {
  const void* data;
  int64_t stride;
  int64_t rows;
  int64_t blocks;
};

struct WeightPass {
  // images[row][column] += <weights[row], panel[:, column]>. Each sum runs over 16 lanes and chunks
  // of the row, so its error grows with the root of the length over 512.
  void (*multiply)(const WeightRows& weights, const float* panel, float* images);
  // panel[:, column] += sum over rows of coefficients[row][column] weights[row]
  void (*multiply_adjoint)(const WeightRows& weights, const float* coefficients, float* panel);
};

// The kernels for weights of `dtype`, float32 or bfloat16.
const WeightPass& weight_pass(int64_t dtype, Isa isa);

}  // namespace lmtfast::cpu
