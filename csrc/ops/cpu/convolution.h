// SPDX-License-Identifier: MIT
// The three products of one stencil operator with a vector: image, adjoint, weight gradient.
//
// All are matrix products of register tiles over packed operands, for every geometry:
//   image     U = W X     X (C T, m) gathered from the planes (stencil.h) panel by panel
//   adjoint   Z = W^T U   then Z (C T, m) is added into planes, and those into the input
//   gradient  dW = U X^T  X^T (m, C T) gathered and transposed panel by panel
// with W, (R, C T) per group in the tensor's own order, read in place: weights are as large as the
// work is, so they must not be repacked. An operator of one output position multiplies vectors.
// The order in which an output entry is summed never depends on the blocks below.
#pragma once

#include <cstdint>
#include <vector>

#include "core/dispatch.h"
#include "ops/cpu/stencil.h"

namespace lmtfast::cpu {

// Depth of a product between two additions into its result; bounds the length of float sums.
constexpr int64_t kDepth = 256;
// Columns of a block of an image, an adjoint and a gradient.
constexpr int64_t kImageColumns = 256;
constexpr int64_t kAdjointColumns = 256;
constexpr int64_t kGradientColumns = 128;
// Rows of a block of a gradient; fixed, for its sums are kept per block.
constexpr int64_t kGradientRows = 672;
// Vectors are loaded and stored whole: this many floats around packed operands are touched.
constexpr int64_t kSlack = 64;

struct Convolution {
  const lmtfast_op_row& row;
  const void* weight;
  bool bfloat16, tap_major;
  const float* row_scale;     // (groups * rows), or null
  const float* column_scale;  // (groups * channels), or null
  Stencil stencil;
  std::vector<int64_t> identity;  // identity_positions(row)

  Convolution(const lmtfast_op_row& row, const lmtfast_tensor& tensor, const float* scales);

  int64_t inputs() const { return volume(row.in); }
  int64_t outputs() const { return stencil.points; }
  int64_t input_entries() const { return row.groups * row.channels * inputs(); }
  int64_t output_entries() const { return row.groups * row.rows * outputs(); }
  int64_t weight_entries() const { return row.groups * row.rows * columns(row); }
  int64_t multiply_adds() const { return weight_entries() * outputs(); }
};

// What one task computes. Groups [group, group_end) and, in each,
//   image     rows [first, last) at outputs [begin, end)
//   adjoint   channels [first, last) at inputs [begin, end): all, unless the stencil is plain
//   gradient  rows [first, last), block `part` of the rows, of columns [begin, end) in the tensor's
//             order
struct Block {
  int64_t group, group_end, first, last, begin, end;
  int64_t part = 0;
};

// Where the gradient goes. With sums, dA = u v^T is reduced to them:
//   row_sums[group * rows + r]        = sum over the block's columns of W column_scale dA
//   column_sums[group * columns + k]  = sum over the block's rows of row_scale W dA
// and `tiles` and `planes` hold unscaled vectors; without, they hold scaled ones.
struct GradientTarget {
  float* gradient;  // null: sums only
  bool accumulate;
  double* row_sums;
  double* column_sums;
};

struct ConvolutionKernels {
  int64_t tile_rows, panel_columns;

  // Packed operands, with their scale if `scaled` (panels always): channels, rows or row tiles
  // [first, last), counted over all groups.
  void (*fill_planes)(const Convolution&, const float* x, bool scaled, float* planes, int64_t first,
                      int64_t last);
  void (*fill_panels)(const Convolution&, const float* u, float* panels, int64_t first,
                      int64_t last);
  void (*fill_tiles)(const Convolution&, const float* u, float factor, bool scaled, float* tiles,
                     int64_t first, int64_t last);

  // The identity reads the vector itself. The sums of squares of what is written are kept per row
  // or channel and block of columns.
  void (*image)(const Convolution&, const float* planes, const float* x, float* u, double* squares,
                const Block&, float* workspace);
  void (*adjoint)(const Convolution&, const float* panels, const float* u, float* x,
                  double* squares, const Block&, float* workspace);
  void (*gradient)(const Convolution&, const float* planes, const float* tiles,
                   const GradientTarget&, const Block&, float* workspace);

  double (*sum_of_squares)(const float* x, int64_t n);
  void (*multiply)(const float* x, double factor, float* y, int64_t n);
};

const ConvolutionKernels& convolution_kernels(Isa isa);

// Whether a vector is its own planes and is read in place; plane_floats is 0 then.
inline bool in_place(const Convolution& op) {
  return op.stencil.plain && op.column_scale == nullptr;
}

// Floats of a packed operand, kSlack before and behind included; operands start behind the first.
int64_t plane_floats(const Convolution& op);
int64_t panel_floats(const Convolution& op, const ConvolutionKernels& kernels);
int64_t tile_floats(const Convolution& op, const ConvolutionKernels& kernels);
int64_t row_tiles(const Convolution& op, const ConvolutionKernels& kernels);

// Row stride of the outputs of Z that an adjoint keeps at a time.
inline int64_t adjoint_stride(const Convolution& op) {
  return std::min(op.outputs(), kAdjointColumns);
}

// Channels of an adjoint that are worked on at a time: enough rows of Z for whole tiles, few enough
// to stay in cache.
int64_t adjoint_width(const Convolution& op);

// Floats a task needs for its own.
int64_t workspace_floats(const Convolution& op, const ConvolutionKernels& kernels);

// Whether columns of an adjoint are independent, so that its blocks may share them out.
inline bool adjoint_by_columns(const Convolution& op) {
  return op.stencil.plain && op.outputs() > 1;
}

// Sums of squares that an image and an adjoint write.
inline int64_t image_squares(const Convolution& op) {
  return op.row.groups * op.row.rows * ((op.outputs() + kImageColumns - 1) / kImageColumns);
}
inline int64_t adjoint_squares(const Convolution& op) {
  const int64_t columns = adjoint_by_columns(op) ? kAdjointColumns : op.inputs();
  return op.row.groups * op.row.channels * ((op.inputs() + columns - 1) / columns);
}

// Blocks that cover a product, of about `target` multiply-adds each.
std::vector<Block> image_blocks(const Convolution& op, const ConvolutionKernels& kernels,
                                int64_t target);
std::vector<Block> adjoint_blocks(const Convolution& op, const ConvolutionKernels& kernels,
                                  int64_t target);
// Independent of everything but the operator: column_blocks of each of its row blocks.
std::vector<Block> gradient_blocks(const Convolution& op, const ConvolutionKernels& kernels);

}  // namespace lmtfast::cpu
