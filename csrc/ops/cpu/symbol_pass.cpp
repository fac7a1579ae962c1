// SPDX-License-Identifier: MIT
// The symbol engine before and during the pass over the weights.
#include <algorithm>
#include <cmath>

#include "core/buffer.h"
#include "ops/cpu/symbol.h"

namespace lmtfast::cpu {
namespace {

// Bytes of weights that stay in the cache between the two products.
constexpr int64_t kCachedBytes = 288 << 10;
// A multiple of the rows of every instruction set's register blocks.
constexpr int64_t kRowStep = 6;
// A tile's sums are rescaled when the images outgrow their power of two by this many bits.
constexpr int kHeadroom = 4;

// Coefficients of the adjoint, diag(row scale) y over the tile's power of two. Where the images
// outgrow that, the sums so far are brought to the new one.
void scale_images(const SymbolRun& run, const SymbolPart& part, SymbolTile& tile, int64_t begin,
                  int64_t rows, float* coefficients) {
  const SymbolOperator& op = run.ops[part.op];
  double y[kRowBlock][kPanelColumns];
  double largest[kCandidates] = {};
  for (int64_t r = 0; r < rows; ++r) {
    image(run, part, begin + r, y[r]);
    const double scale = op.row_scale ? op.row_scale[part.group * op.row->rows + begin + r] : 1.0;
    for (int k = 0; k < kPanelColumns; ++k) {
      y[r][k] *= scale;
      largest[k / 2] = std::max(largest[k / 2], std::fabs(y[r][k]));
    }
  }
  double factor[kCandidates];
  for (int f = 0; f < kCandidates; ++f) {
    if (largest[f] > 0 && std::isfinite(largest[f])) {
      const int exponent = std::ilogb(largest[f]);
      if (tile.exponent[f] == kUnset) {
        tile.exponent[f] = exponent;
      } else if (exponent > tile.exponent[f] + kHeadroom) {
        const float down = static_cast<float>(std::ldexp(1.0, tile.exponent[f] - exponent));
        for (int64_t b = 0; b < op.blocks; ++b) {
          float* sums = tile.sums + b * kPanelBlock + 2 * f * kBlock;
          for (int i = 0; i < 2 * kBlock; ++i) sums[i] *= down;
        }
        tile.exponent[f] = exponent;
      }
    }
    factor[f] = tile.exponent[f] == kUnset ? 1.0 : std::ldexp(1.0, -tile.exponent[f]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int k = 0; k < kPanelColumns; ++k) {
      coefficients[r * kPanelColumns + k] = static_cast<float>(y[r][k] * factor[k / 2]);
    }
  }
}

}  // namespace

void image(const SymbolRun& run, const SymbolPart& part, int64_t r, double (&y)[kPanelColumns]) {
  for (int k = 0; k < kPanelColumns; ++k) y[k] = image_entry(run, part, r, k);
}

double unit_length(float* x, int64_t n) {
  double squares = 0.0;
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const double length = std::sqrt(squares);
  if (length == 0.0) return 0.0;
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<float>(static_cast<double>(x[i]) / length);
  return length;
}

void prepare(const SymbolRun& run, SymbolPart& part) {
  const SymbolOperator& op = run.ops[part.op];
  const int64_t channels = op.row->channels, rows = op.row->rows;
  for (int f = 0; f < kCandidates; ++f) {
    const float* slot = run.call.state + op.slot(part.group, f);
    for (int64_t a = 0; a < op.row->axes; ++a)
      part.w[a][f] = std::atan2(slot[2 * a + 1], slot[2 * a]);
    float* x = part.x + f * 2 * op.width;
    std::copy_n(slot + 2 * op.row->axes, 2 * op.width, x);
    unit_length(x, 2 * op.width);
  }
  op.spectrum.terms(part.w, part.terms);
  Buffer<float> line((op.blocks + 1) * kBlock), terms(op.period * kPanelBlock);
  for (int k = 0; k < kPanelColumns; ++k) {
    const float* x = part.x + k / 2 * 2 * op.width + k % 2;
    op.spread(x, op.column_scale_of(part.group), line.data());
    std::fill(line.data() + op.columns, line.data() + op.blocks * kBlock, 0.0f);
    write_column(line.data(), op.blocks, k, part.panel);
  }
  op.repeat_terms(part.terms, terms.data());
  panel_kernels(best_isa()).rotate(terms.data(), op.period, false, op.blocks, part.panel);
  if (!part.centre) return;
  const Complex& e = part.terms[op.centre];
  std::fill(part.centre, part.centre + rows * kPanelColumns, 0.0f);
  for (int64_t c = 0; c < std::min(channels, rows); ++c) {
    for (int f = 0; f < kCandidates; ++f) {
      const float* x = part.x + 2 * (f * op.width + op.spectrum.phase(op.centre) * channels + c);
      float* share = part.centre + c * kPanelColumns + 2 * f;
      share[0] = static_cast<float>(op.row->identity * (e.re[f] * x[0] - e.im[f] * x[1]));
      share[1] = static_cast<float>(op.row->identity * (e.re[f] * x[1] + e.im[f] * x[0]));
    }
  }
}

void pass(const SymbolRun& run, SymbolTile& tile) {
  const SymbolPart& part = run.parts[tile.part];
  const SymbolOperator& op = run.ops[part.op];
  const WeightPass& kernels = weight_pass(op.weight->dtype, best_isa());
  const WeightPass& tail_kernels = weight_pass(LMTFAST_FLOAT32, best_isa());
  const int64_t whole = op.columns / kBlock, rest = op.columns % kBlock;
  const int64_t height = std::clamp<int64_t>(
      kCachedBytes / (op.columns * op.weight_bytes()) / kRowStep * kRowStep, kRowStep, kRowBlock);
  alignas(64) float tail[kRowBlock * kBlock] = {};
  alignas(64) float coefficients[kRowBlock * kPanelColumns];
  std::fill(tile.exponent, tile.exponent + kCandidates, kUnset);
  for (int64_t begin = tile.begin; begin < tile.end; begin += height) {
    const int64_t rows = std::min(height, tile.end - begin);
    const int64_t first = (part.group * op.row->rows + begin) * op.columns;
    WeightRows weights{op.weight_at(first), op.columns, rows, whole};
    if (begin + rows < tile.end) weights.next = op.weight_at(first + rows * op.columns);
    const WeightRows end{tail, kBlock, rows, rest > 0};
    for (int64_t r = 0; r < rows && rest > 0; ++r) {
      op.copy_weights(first + r * op.columns + whole * kBlock, rest, tail + r * kBlock);
    }
    float* images = part.images + begin * kPanelColumns;
    std::fill(images, images + rows * kPanelColumns, 0.0f);
    kernels.multiply(weights, part.panel, images);
    if (rest > 0) tail_kernels.multiply(end, part.panel + whole * kPanelBlock, images);
    if (!tile.sums) continue;
    scale_images(run, part, tile, begin, rows, coefficients);
    const bool fresh = begin == tile.begin;
    kernels.multiply_adjoint(weights, coefficients, fresh, tile.sums);
    if (rest == 0) continue;
    tail_kernels.multiply_adjoint(end, coefficients, fresh, tile.sums + whole * kPanelBlock);
  }
}

}  // namespace lmtfast::cpu
