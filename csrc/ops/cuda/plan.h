// SPDX-License-Identifier: MIT
// What the host decides once per network: which block of which launch does what, and where
// intermediate results lie. One array of int64, kept on the host and copied to the device: a header,
// the rows, scales and tape as they came, and behind them the work below.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/cuda/pass.h"
#include "ops/cuda/stencil.h"
#include "ops/spectral.h"

namespace lmtfast::cuda {

// How an operator is run: by its engine, but a matrix under the power iteration has products of its
// own, bound by memory, and a diagonal map has none.
enum class Method : int64_t { kSymbol, kSeparable, kStencil, kMatrix, kDiagonal };

LMTFAST_HD Method method_of(const OpRow& row) {
  if (row.kind == LMTFAST_DIAGONAL) return Method::kDiagonal;
  if (row.engine == LMTFAST_SYMBOL) return Method::kSymbol;
  if (row.engine == LMTFAST_SEPARABLE) return Method::kSeparable;
  return row.axes == 0 ? Method::kMatrix : Method::kStencil;
}

// Whether the gradient of the weights is an outer product of at most two vectors each, so that a
// thread can keep its columns. Scales of a matrix need sums of its rows: tiles have those.
LMTFAST_HD bool gradient_in_strips(const OpRow& row) {
  const Method method = method_of(row);
  return method == Method::kSymbol ||
         (method == Method::kMatrix && row.row_scale < 0 && row.column_scale < 0);
}

// A separable operator's panel is a matrix with eight real columns: its vectors, and zeros.
constexpr int kPanel = LMTFAST_RANK;
static_assert(kPanel == 8);
constexpr int kBlockThreads = 256;
static_assert(kBlockThreads == kPassThreads);
// Rows of a block of a panel's image, columns of a block of its adjoint.
constexpr int kImageRows = 32;
constexpr int kBackColumns = 64;
// Weight columns whose sums over the tiles of a pass one block adds.
constexpr int kSumColumns = 256;
// Side of a tile of a product (tile.h), its depth per step, and the shared memory of a step.
constexpr int kTileSide = 64;
constexpr int kTileStep = 16;
constexpr int kTilePitch = kTileSide + 4;
constexpr int64_t kTileBytes = 2 * kTileStep * kTilePitch * 4;
// Columns of a block of a gradient that is an outer product; its rows are those of a tile.
constexpr int kStripColumns = 4 * kBlockThreads;
// Entries of a vector that one block sums or scales.
constexpr int kVectorEntries = 4096;

// One block of a launch.
struct Item {
  int32_t op, group, tile, tiles;
};
static_assert(sizeof(Item) == 2 * sizeof(int64_t));

// Launches; their items are one stretch of the table each.
enum Stage {
  kPrepare,  // scales, norms of diagonal maps, vectors that products read; the first item
             // writes the tensors
  kPass,     // symbol, matrix: both products with the weights; separable: panels through them,
             // then the grid's share
  kRecord,   // their sigma and saved vectors
  kFinish,   // symbol, matrix: sums of the adjoint over the tiles; separable: panels back through
             // the weights; then new iterates
  kFirstImage,     // A v of convolutions,
  kFirstAdjoint,   // of transposed ones
  kSecondAdjoint,  // A^T u of convolutions,
  kSecondImage,    // of transposed ones
  kGradient,       // weight gradients; weights that are read in several shapes take rounds; an item
                   // of a diagonal map has none, but its turn in a circle
  kGradientSums,   // gradient of the scale buffer, sorted by circle
  kGradientSlots,  // gradients of the tensors of scales, sorted by circle: tensor `op`, factor `group`
                   // of the table, and the factors `tile`..`tiles` among which are its companions
  kStages
};

// Where an operator's intermediate results lie: offsets in the floats and doubles of the workspace.
// Arrays start with the groups where that is said.
struct OpWork {
  Stencil stencil;
  int64_t method;
  int64_t image_tiles, back_tiles;  // blocks per group of the product and of its adjoint
  int64_t scale_begin, scale_end;   // scale rows among which are all of this operator's
  int64_t accumulate;               // an operator of an earlier round has written the gradient
  int64_t tied;                     // the operator that adds to the same gradient after this, or -1
  int64_t circle;                   // of operators whose scales share tensors, or -1 without scales
  int64_t frequencies[kAxes];       // symbol: points of the grid of frequencies, per axis
  PassShape pass;                   // symbol, matrix
  int64_t counters;                 // blocks that are done: stencil 1, of groups G, separable 2 G
  // Floats. Panels start at multiples of 16 bytes. F candidates; C = kPassColumns.
  int64_t panel;     // symbol, matrix (G, subsets, pass.vector): the factors of what the weights
                     // multiply (pass.h); separable (G, channels, 8): a, orthonormal; with the
                     // column scale
  int64_t plain;     // symbol (G, F, phases channels, 2): unit x; matrix (channels): unit v;
                     // separable (G, channels, 8): a, without the column scale
  int64_t pure;      // symbol, matrix (G, rows, C): W panel, without row scale and identity
  int64_t partial;   // symbol, matrix (G, tiles, subsets, padded columns): sums of a tile's rows
  int64_t image;     // A applied: symbol, matrix (G, rows, C), separable (G, rows, taps, 8),
                     // stencil as u is saved
  int64_t mixed;     // separable (G, rows, taps, 8): what goes back through the weights
  int64_t back;      // the adjoint, with column scale and identity: symbol, matrix (G, columns, C),
                     // separable (G, columns, 8), stencil as the iterate
  int64_t phase;     // symbol (G, taps, F, 2): exp(-i w . offset)
  int64_t fresh;     // symbol (G, F, phases channels, 2): the next x, not normalised
  int64_t patterns;  // separable (G, inputs, 8): h
  int64_t next;      // separable (G, inputs, 8): the next h
  int64_t grid;      // separable (G, outputs, taps, 8): a product on the grid
  int64_t gram;      // separable (G, taps 8, taps 8)
  int64_t overlap;   // separable (G, taps 8, taps 8)
  int64_t saved_overlap, saved_mixed;  // separable, one group: on the way to the saved image
  int64_t row_sums;                    // gradient of the row scale (G, column tiles, rows)
  int64_t column_sums;                 // gradient of the column scale (G, row tiles, columns)
  // Doubles.
  int64_t norms;      // symbol, matrix (G, tiles, C): sums of squares per panel column
  int64_t powers;     // symbol, matrix (G, tiles, subsets): what a tile's sums are scaled by
  int64_t frequency;  // symbol (G, F, 3)
  int64_t response;   // symbol (G, taps, F, 2)
  int64_t values;     // separable (G, 2): sigma, and sigma over the scale of the image
  int64_t input_sums, image_sums, back_sums;  // stencil: sums of squares per block
  int64_t inputs, images, backs;              // and how many of them
};

static_assert(sizeof(OpWork) % sizeof(int64_t) == 0);

// Operators whose scales share tensors: the block that completes their weight gradients goes on to
// those of the scales.
struct Circle {
  int64_t blocks;
  int64_t sums_begin, sums_end, slots_begin, slots_end;  // items of the two stages
};

// Start of the table; all int64.
struct PlanHeader {
  int64_t magic;
  int64_t table_size;  // int64 entries
  int64_t n_rows, n_scales, n_tape, features, total, scale_size, saved_size, state_size;
  int64_t rows, scales, tape, work;  // offsets in the table
  int64_t stage[kStages], blocks[kStages];
  int64_t rounds, n_rounds;           // where the rounds of kGradient begin, and their end
  int64_t n_slots;                    // tensors that a call must bring
  int64_t floats, doubles, counters;  // of the workspace
  int64_t pass_bytes, finish_bytes;   // shared memory of kPass, and of kRecord and kFinish
  int64_t circles, n_circles;
  int64_t grad_scales;  // floats: gradient of the scale buffer
};

constexpr int64_t kPlanMagic = 0x6C6D74666173740A;
// Tensors of a call: their addresses and those of their gradients are arguments of a launch, which
// may have 32 KiB of them.
constexpr int64_t kMaxTensors = 1800;

// Shared memory per block that is not for the pass: what its kernel has besides.
constexpr int64_t kOtherShared = 4 << 10;

// The table of a network for a device whose blocks may have `shared_bytes` of shared memory. Throws
// InvalidArgument where it is not one that the kernels run.
std::vector<int64_t> make_plan(const lmtfast_network& network, int64_t shared_bytes);

// The header of a table that make_plan has made; throws InvalidArgument for any other.
const PlanHeader& header_of(const int64_t* table);

// The network inside a table.
lmtfast_network network_of(const int64_t* table);

// Bytes of a call's workspace: tensors, doubles, floats, counters, in this order.
int64_t workspace_bytes(const PlanHeader& header);
int64_t compose_doubles(const PlanHeader& header);

}  // namespace lmtfast::cuda
