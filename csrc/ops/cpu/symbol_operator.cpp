// SPDX-License-Identifier: MIT
#include <algorithm>
#include <bit>
#include <numeric>

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

void SymbolOperator::spread(const float* x, const float* scale, float* line) const {
  const int64_t channels = row->channels, n_taps = spectrum.taps();
  if (channel_step > 1 && width == channels) {
    // The taps of a channel are neighbours and read one entry: whole blocks of it are written faster
    // than as many as there are taps, and the next channel takes back what is too much.
    for (int64_t c = 0; c < channels; ++c, line += n_taps) {
      const float value = scale ? x[2 * c] * scale[c] : x[2 * c];
      for (int64_t t = 0; t < n_taps; t += kBlock) std::fill_n(line + t, kBlock, value);
    }
    return;
  }
  for (int64_t t = 0; t < n_taps; ++t) {
    const float* from = x + 2 * spectrum.phase(t) * channels;
    for (int64_t c = 0; c < channels; ++c) {
      line[at(c, t)] = scale ? from[2 * c] * scale[c] : from[2 * c];
    }
  }
}

void SymbolOperator::collect(const float* line, const float* scale, float* x) const {
  const int64_t channels = row->channels, n_taps = spectrum.taps();
  if (channel_step > 1 && width == channels) {
    for (int64_t c = 0; c < channels; ++c, line += n_taps) {
      x[2 * c] = std::accumulate(line, line + n_taps, 0.0f);
    }
  } else {
    for (int64_t i = 0; i < width; ++i) x[2 * i] = 0.0f;
    for (int64_t t = 0; t < n_taps; ++t) {
      float* to = x + 2 * spectrum.phase(t) * channels;
      for (int64_t c = 0; c < channels; ++c) to[2 * c] += line[at(c, t)];
    }
  }
  for (int64_t i = 0; i < width && scale; ++i) x[2 * i] *= scale[i % channels];
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
