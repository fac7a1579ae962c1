// SPDX-License-Identifier: MIT
#include "ops/cpu/convolution.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/simd.h"

namespace lmtfast::cpu {

namespace baseline {
namespace v = simd::baseline;
#include "ops/cpu/convolution_kernels.h"
}  // namespace baseline

#if LMTFAST_X86_CLONES
LMTFAST_TARGET_BEGIN_AVX2
namespace avx2 {
namespace v = simd::avx2;
#include "ops/cpu/convolution_kernels.h"
}  // namespace avx2
LMTFAST_TARGET_END

LMTFAST_TARGET_BEGIN_AVX512
namespace avx512 {
namespace v = simd::avx512;
#include "ops/cpu/convolution_kernels.h"
}  // namespace avx512
LMTFAST_TARGET_END
#endif

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows shared out evenly among blocks of at most `most`.
void split(int64_t rows, int64_t most, std::vector<int64_t>& bounds) {
  const int64_t blocks = ceil_div(rows, std::max<int64_t>(1, most));
  bounds.clear();
  for (int64_t i = 0; i <= blocks; ++i) bounds.push_back(rows * i / blocks);
}

}  // namespace

const ConvolutionKernels& convolution_kernels(Isa isa) {
#if LMTFAST_X86_CLONES
  if (isa == Isa::kAvx512) return avx512::kKernels;
  if (isa == Isa::kAvx2) return avx2::kKernels;
#endif
  (void)isa;
  return baseline::kKernels;
}

Convolution::Convolution(const lmtfast_op_row& r, const lmtfast_tensor& tensor, const float* scales)
    : row(r),
      weight(tensor.data),
      bfloat16(tensor.dtype == LMTFAST_BFLOAT16),
      tap_major(tensor.tap_major != 0),
      row_scale(r.row_scale < 0 ? nullptr : scales + r.row_scale),
      column_scale(r.column_scale < 0 ? nullptr : scales + r.column_scale),
      stencil(r),
      identity(identity_positions(r)) {}

int64_t plane_floats(const Convolution& op) {
  return in_place(op) ? 0 : op.row.groups * op.row.channels * op.stencil.plane + 2 * kSlack;
}

int64_t panel_floats(const Convolution& op, const ConvolutionKernels& kernels) {
  const int64_t points = op.outputs();
  const int64_t held =
      points == 1 ? 1 : ceil_div(points, kernels.panel_columns) * kernels.panel_columns;
  return op.row.groups * op.row.rows * held + 2 * kSlack;
}

int64_t row_tiles(const Convolution& op, const ConvolutionKernels& kernels) {
  return op.row.groups * ceil_div(op.row.rows, kernels.tile_rows);
}

int64_t tile_floats(const Convolution& op, const ConvolutionKernels& kernels) {
  return row_tiles(op, kernels) * (op.outputs() * kernels.tile_rows + kSlack) + 2 * kSlack;
}

int64_t adjoint_width(const Convolution& op) {
  const int64_t rows = op.outputs() == 1 ? 4096 : 192;
  const int64_t by_planes = std::max<int64_t>(1, (1 << 17) / op.stencil.plane);
  return std::clamp<int64_t>(std::min(rows / taps(op.row), by_planes), 1, op.row.channels);
}

int64_t workspace_floats(const Convolution& op, const ConvolutionKernels& kernels) {
  const bool one = op.outputs() == 1;
  const int64_t image =
      kernels.tile_rows * (kDepth + 16) + (one ? columns(op.row) : kDepth * kImageColumns);
  // The most channels at a time; Z and their planes, behind the packed weights.
  const int64_t channels = adjoint_width(op), z_rows = channels * taps(op.row);
  const int64_t tiles = one ? 0 : ceil_div(z_rows, kernels.tile_rows);
  const int64_t adjoint = tiles * (kDepth * kernels.tile_rows + kSlack) +
                          z_rows * adjoint_stride(op) + channels * op.stencil.plane;
  const int64_t rows = std::min(op.row.rows, kGradientRows);
  const int64_t gradient = (kDepth + 1 + rows) * kGradientColumns;
  return std::max({image, adjoint, gradient}) + 4 * kSlack;
}

std::vector<Block> image_blocks(const Convolution& op, const ConvolutionKernels& kernels,
                                int64_t target) {
  const int64_t points = op.outputs(), width = std::min(points, kImageColumns);
  const int64_t per_row = columns(op.row) * width;
  std::vector<int64_t> groups, rows;
  // Small groups share a task; rows of a large one are split, but gathering must pay.
  split(op.row.groups, target / (op.row.rows * per_row), groups);
  const int64_t least = points == 1 ? 16 : 8 * kernels.tile_rows;
  split(op.row.rows, std::max(least, target / per_row), rows);
  std::vector<Block> blocks;
  for (size_t g = 0; g + 1 < groups.size(); ++g) {
    for (int64_t o = 0; o < points; o += kImageColumns) {
      for (size_t r = 0; r + 1 < rows.size(); ++r) {
        blocks.push_back({groups[g], groups[g + 1], rows[r], rows[r + 1], o,
                          std::min(points, o + kImageColumns)});
      }
    }
  }
  return blocks;
}

std::vector<Block> adjoint_blocks(const Convolution& op, const ConvolutionKernels& kernels,
                                  int64_t target) {
  const int64_t inputs = op.inputs(), width = adjoint_by_columns(op) ? kAdjointColumns : inputs;
  const int64_t per_channel =
      op.row.rows * taps(op.row) * (adjoint_by_columns(op) ? width : op.outputs());
  std::vector<int64_t> groups, channels;
  split(op.row.groups, target / (op.row.channels * per_channel), groups);
  const int64_t least = ceil_div(4 * kernels.tile_rows, taps(op.row));
  split(op.row.channels, std::max(least, target / per_channel), channels);
  std::vector<Block> blocks;
  for (size_t g = 0; g + 1 < groups.size(); ++g) {
    for (int64_t i = 0; i < inputs; i += width) {
      for (size_t c = 0; c + 1 < channels.size(); ++c) {
        blocks.push_back({groups[g], groups[g + 1], channels[c], channels[c + 1], i,
                          std::min(inputs, i + width)});
      }
    }
  }
  return blocks;
}

std::vector<Block> gradient_blocks(const Convolution& op, const ConvolutionKernels& kernels) {
  constexpr int64_t target = 1 << 22;
  const int64_t width = columns(op.row);
  const int64_t tiles = ceil_div(op.row.rows, kernels.tile_rows);
  std::vector<int64_t> groups, row_blocks;
  split(op.row.groups, target / (op.row.rows * width * op.outputs()), groups);
  split(tiles, kGradientRows / kernels.tile_rows, row_blocks);
  std::vector<Block> blocks;
  for (size_t g = 0; g + 1 < groups.size(); ++g) {
    for (size_t r = 0; r + 1 < row_blocks.size(); ++r) {
      for (int64_t k = 0; k < width; k += kGradientColumns) {
        blocks.push_back({groups[g], groups[g + 1], op.row.rows * row_blocks[r] / tiles,
                          op.row.rows * row_blocks[r + 1] / tiles, k,
                          std::min(width, k + kGradientColumns), static_cast<int64_t>(r)});
      }
    }
  }
  return blocks;
}

}  // namespace lmtfast::cpu
