// SPDX-License-Identifier: MIT
// Products of weight rows with a few columns, for engines that read each weight once.
//
// Both products walk a row and a panel in step, and a row that is still in the cache serves both.
#pragma once

#include <cstdint>

#include "core/dispatch.h"
#include "ops/cpu/panel.h"

namespace lmtfast::cpu {

// Rows of one call.
constexpr int kRowBlock = 24;

// Weight rows, `stride` entries apart, of whole blocks. The first of `next`, rows of the same stride
// that the next call reads, are fetched into the cache before the call ends; null: there are none.
struct WeightRows {
  const void* data;
  int64_t stride;
  int64_t rows;
  int64_t blocks;
  const void* next = nullptr;
};

struct WeightPass {
  // images[row][column] += <weights[row], panel[:, column]>. Each sum runs over 16 lanes and chunks
  // of the row, so its error grows with the root of the length over 512.
  void (*multiply)(const WeightRows& weights, const float* panel, float* images);
  // panel[:, column] += sum over rows of coefficients[row][column] weights[row], or = where `first`
  void (*multiply_adjoint)(const WeightRows& weights, const float* coefficients, bool first,
                           float* panel);
};

// The kernels for weights of `dtype`, float32 or bfloat16.
const WeightPass& weight_pass(int64_t dtype, Isa isa);

}  // namespace lmtfast::cpu
