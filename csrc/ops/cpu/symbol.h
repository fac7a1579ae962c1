// SPDX-License-Identifier: MIT
// What the symbol engine's step and its gradient share on the CPU.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "ops/cpu/frequency.h"
#include "ops/cpu/weight_pass.h"
#include "ops/spectral.h"

namespace lmtfast::cpu {

// An operator of the table with its tensors resolved.
struct SymbolOperator {
  SymbolOperator(const lmtfast_network& network, const lmtfast_tensor* tensors, const float* scales,
                 int64_t index);

  const lmtfast_op_row* row;
  int64_t index;
  const lmtfast_tensor* weight;
  const float* row_scale;     // (G R); null: ones
  const float* column_scale;  // (G C); null: ones
  Spectrum spectrum;
  int64_t columns, blocks;  // C T, and the blocks of a panel
  int64_t width;            // P C
  int64_t centre;           // the identity's tap
  int64_t channel_step, tap_step;
  // Blocks after which the taps of a weight row's entries repeat.
  int64_t period;
  int64_t first_part = 0;

  // Entry of a weight row.
  int64_t at(int64_t channel, int64_t tap) const { return channel * channel_step + tap * tap_step; }
  // Offset of a candidate's iterate in the state; behind the last one lies the anchor.
  int64_t slot(int64_t group, int64_t candidate) const {
    const int64_t entries = 2 * (row->axes + width);
    return row->state_offset + group * (kCandidates * entries + 2 * row->axes) +
           candidate * entries;
  }
  int64_t weight_bytes() const { return weight->dtype == LMTFAST_BFLOAT16 ? 2 : 4; }
  const void* weight_at(int64_t first) const {
    return static_cast<const char*>(weight->data) + first * weight_bytes();
  }
  const float* column_scale_of(int64_t group) const {
    return column_scale ? column_scale + group * row->channels : nullptr;
  }
  void copy_weights(int64_t first, int64_t n, float* to) const;
  // From a number per tap to one per entry of a weight row, `period` blocks of them, and the sums
  // over entries of the same tap.
  void repeat_terms(const Complex* terms, float* panel) const;
  void sum_taps(const float* panel, Complex* terms) const;
  // From an iterate (P C, 2), its real or its imaginary parts, to the entries of a weight row that
  // read them, and back as sums over the taps. spread may write less than a block past the row.
  void spread(const float* x, const float* scale, float* line) const;
  void collect(const float* line, const float* scale, float* x) const;
};

// Where a step keeps what the gradient needs (csrc/ops/spectral.h).
template <class T>
struct SymbolSavedAt {
  T *group, *u, *z, *p;

  SymbolSavedAt(const lmtfast_op_row& row, T* saved)
      : group(saved + row.saved_offset),
        u(group + 1),
        z(u + 2 * row.rows),
        p(z + 2 * row.channels * taps(row)) {}
};
using SymbolSaved = SymbolSavedAt<float>;

// Rows [begin, end) of a group. The sums over them are scaled by 2^-exponent, per candidate; it is
// unset where all of the candidate's images are zero or not finite.
constexpr int kUnset = std::numeric_limits<int>::min();
struct SymbolTile {
  int64_t part, begin, end;
  int exponent[kCandidates];
  float* sums;  // panel; null where the iterates stay
};

// One group of one operator.
struct SymbolPart {
  int64_t op, group;
  int64_t first_tile, end_tile;
  float* x;        // (F, P C, 2), unit vectors
  float* panel;    // diag(column scale) z
  float* images;   // (R, 2 F): p = W diag(column scale) z
  float* centre;   // (R, 2 F): the identity's share of the images; null without one
  Complex* terms;  // (T): exp(-i w . offset)
  Frequencies w;
  double values[kCandidates];  // ||A(w) x||
};

struct SymbolRun {
  const SpectralStep& call;
  std::vector<SymbolOperator> ops;
  std::vector<SymbolPart> parts;
  std::vector<SymbolTile> tiles;
};

// Frequencies and unit vectors of the state, and z in the order of the weights.
void prepare(const SymbolRun& run, SymbolPart& part);
// Both products with a tile's rows, a block of rows at a time while it is in the cache.
void pass(const SymbolRun& run, SymbolTile& tile);

// y = diag(row scale) p + identity * (centre of z), at one row: column k, or all of them.
inline double image_entry(const SymbolRun& run, const SymbolPart& part, int64_t r, int k) {
  const SymbolOperator& op = run.ops[part.op];
  const double scale = op.row_scale ? op.row_scale[part.group * op.row->rows + r] : 1.0;
  const double y = scale * static_cast<double>(part.images[r * kPanelColumns + k]);
  return part.centre ? y + static_cast<double>(part.centre[r * kPanelColumns + k]) : y;
}
void image(const SymbolRun& run, const SymbolPart& part, int64_t r, double (&y)[kPanelColumns]);
// Divides x by its length, which it returns; zero stays zero.
double unit_length(float* x, int64_t n);

}  // namespace lmtfast::cpu
