// SPDX-License-Identifier: MIT
#include <algorithm>
#include <bit>

#include "ops/cpu/symbol.h"

namespace lmtfast::cpu {

SymbolOperator::SymbolOperator(const lmtfast_network& network, const lmtfast_tensor* tensors,
                               const float* scales, int64_t which)
    : row(&network.rows[which]),
      index(which),
      weight(&tensors[row->weight_slot]),
      row_scale(row->row_scale < 0 ? nullptr : scales + row->row_scale),
      column_scale(row->column_scale < 0 ? nullptr : scales + row->column_scale),
      spectrum(*row),
      columns(lmtfast::columns(*row)),
      blocks(blocks_of(columns)),
      width(phases(*row) * row->channels),
      centre(row->identity == 0.0 ? 0 : centre_tap(*row)),
      channel_step(weight->tap_major ? 1 : spectrum.taps()),
      tap_step(weight->tap_major ? row->channels : 1),
      period(weight->tap_major ? blocks : std::min(spectrum.taps(), blocks)) {}

void SymbolOperator::copy_weights(int64_t first, int64_t n, float* to) const {
  if (weight->dtype == LMTFAST_FLOAT32) {
    std::copy_n(static_cast<const float*>(weight->data) + first, n, to);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(weight->data) + first;
  for (int64_t i = 0; i < n; ++i) {
    to[i] = std::bit_cast<float>(static_cast<uint32_t>(from[i]) << 16);
  }
}

void SymbolOperator::repeat_terms(const Complex* terms, float* panel) const {
  for (int64_t n = 0; n < period * kBlock; ++n) {
    const int64_t tap = n / tap_step % spectrum.taps();
    float* at = panel + n / kBlock * kPanelBlock + n % kBlock;
    for (int f = 0; f < kCandidates; ++f) {
      at[2 * f * kBlock] = static_cast<float>(terms[tap].re[f]);
      at[(2 * f + 1) * kBlock] = static_cast<float>(terms[tap].im[f]);
    }
  }
}

void SymbolOperator::sum_taps(const float* panel, Complex* terms) const {
  std::fill(terms, terms + spectrum.taps(), Complex{});
  for (int64_t n = 0; n < std::min(period * kBlock, columns); ++n) {
    const float* at = panel + n / kBlock * kPanelBlock + n % kBlock;
    Complex& sum = terms[n / tap_step % spectrum.taps()];
    for (int f = 0; f < kCandidates; ++f) {
      sum.re[f] += static_cast<double>(at[2 * f * kBlock]);
      sum.im[f] += static_cast<double>(at[(2 * f + 1) * kBlock]);
    }
  }
}

}  // namespace lmtfast::cpu
