// SPDX-License-Identifier: MIT
// One pass over the weights for both products of a power step: y = W z and z' = W^T y, each weight
// read once. A block takes a tile of rows and streams it four rows at a time: 16-byte loads into
// registers, the sums of y over the block, then the same registers times y into the accumulators of
// z'. Meanwhile the next four rows are on their way.
//
// A thread owns the columns of its words in every row, so accumulators are private to it and need no
// barrier. They lie in shared memory where a block has room, for both candidates or for one per block,
// and otherwise where their sums go anyway. y is not normalised: a tile scales it by a
// power of two that follows its largest entry, so that nothing over- or underflows.
//
// z is not stored either: z[channel, tap] = e[tap] x[phase of the tap, channel], complex, and x with
// the column scale and e are small enough to stay in shared memory.
#pragma once

#include "ops/cuda/stencil.h"

namespace lmtfast::cuda {

// Columns of a panel: real and imaginary part of every candidate, a row of them one access. A matrix
// uses two, and zeros in the second.
constexpr int kPassColumns = 2 * LMTFAST_CANDIDATES;
static_assert(kPassColumns * sizeof(float) == 16);
// Rows in flight; a warp has a lane for every sum of theirs.
constexpr int kPassRows = 4;
constexpr int kPassThreads = 256;
// Columns of a row that the threads keep in registers from the first product for the second. The rest
// of longer rows is read again, from L2.
constexpr int kHeldColumns = 6144;
constexpr int kWordBytes = 16;

// How the blocks of one operator share a pass.
struct PassShape {
  int64_t columns;                     // of the panel per block: 4 or 2
  int64_t subsets;                     // blocks that share the candidates
  int64_t rows, tiles;                 // of a tile, and how many
  int64_t padded;                      // weight columns, to whole words
  int64_t vector;                      // floats of x, e and the phases' beginnings
  int64_t shared_vector, shared_sums;  // whether these lie in shared memory
};

// Floats between two of the four interleaved parts of x: threads of a warp that read every fourth
// entry, and those that read neighbours, find them in different banks.
LMTFAST_HD int64_t vector_pitch(int64_t entries) { return ((entries + 3) / 4 + 7) / 8 * 8 + 2; }

LMTFAST_HD int64_t vector_slot(int64_t entry, int64_t pitch) {
  return (entry & 3) * pitch + (entry >> 2);
}

// x, then e (taps, columns), then where the phase of each tap begins among the entries.
LMTFAST_HD int64_t vector_floats(int64_t entries, int64_t taps, int64_t columns) {
  return (4 * vector_pitch(entries) * columns + taps * (columns + 1) + 3) / 4 * 4;
}

// Where an accumulator lies: chunks of one word per thread, and in each the thread runs fastest.
LMTFAST_HD int64_t sum_index(int64_t weight_columns, int64_t per_word, int64_t columns,
                             int64_t column, int64_t c) {
  const int64_t chunk = column / (kPassThreads * per_word);
  const int64_t inside = column % (kPassThreads * per_word);
  const int64_t words = (weight_columns + per_word - 1) / per_word - chunk * kPassThreads;
  const int64_t width = words < kPassThreads ? words : kPassThreads;
  const int64_t place = inside % per_word * width + inside / per_word;
  return (chunk * kPassThreads * per_word + place) * columns + c;
}

}  // namespace lmtfast::cuda
