// SPDX-License-Identifier: MIT
// Panels: kPanelColumns columns of the same length, in blocks of kBlock entries that are padded with
// zeros: panel[block][column][entry]. Columns 2 f and 2 f + 1 are a complex column.
#pragma once

#include <cstdint>

#include "core/dispatch.h"

namespace lmtfast::cpu {

constexpr int kBlock = 16;
constexpr int kPanelColumns = 4;
constexpr int kPanelBlock = kBlock * kPanelColumns;

inline int64_t blocks_of(int64_t entries) { return (entries + kBlock - 1) / kBlock; }

// Column k of a panel from, or to, consecutive entries.
void write_column(const float* entries, int64_t blocks, int k, float* panel);
void read_column(const float* panel, int64_t blocks, int k, float* entries);

struct PanelKernels {
  // sum += factors[column / 2] * share, or = where `first`
  void (*add)(const float* share, int64_t blocks, const float* factors, bool first, float* sum);
  // x *= e, complex, or conj(e) where `conjugate`; e has `period` blocks and is repeated.
  void (*rotate)(const float* e, int64_t period, bool conjugate, int64_t blocks, float* x);
  // products[b % period] = sum over such b of conj(a[b]) z[b], complex
  void (*correlate)(const float* a, const float* z, int64_t blocks, int64_t period,
                    float* products);
};

const PanelKernels& panel_kernels(Isa isa);

}  // namespace lmtfast::cpu
