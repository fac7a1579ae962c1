// SPDX-License-Identifier: MIT
// The first launch of every call: the table of tensors, the scale buffer, the norms of diagonal maps,
// and the vectors that the first products read.
#include <cmath>

#include "ops/cuda/matrix.h"
#include "ops/cuda/scales.h"
#include "ops/cuda/separable.h"
#include "ops/cuda/spectral.h"
#include "ops/cuda/symbol.h"

namespace lmtfast::cuda {
namespace {

// Sum of squares of a stretch of a convolution's iterate.
__device__ void sum_input(const View& v, const Item& item) {
  const OpRow& row = v.rows[item.op];
  const Stencil& s = v.work[item.op].stencil;
  const int64_t entries =
      static_cast<int64_t>(s.groups) * (s.transposed ? static_cast<int64_t>(s.rows) * s.outputs
                                                     : static_cast<int64_t>(s.channels) * s.inputs);
  const int64_t begin = static_cast<int64_t>(item.tile) * kVectorEntries;
  double square = 0;
  for (int64_t i = begin + threadIdx.x; i < begin + kVectorEntries && i < entries;
       i += kBlockThreads) {
    const double x = v.state[row.state_offset + i];
    square += x * x;
  }
  square = Team<true>::sum(square);
  if (threadIdx.x == 0) v.doubles[v.work[item.op].input_sums + item.tile] = square;
}

__device__ float scale_entry(const View& v, const OpWork& work, int64_t i) {
  double product = 1.0;
  for (int64_t k = work.scale_begin; k < work.scale_end; ++k) {
    const lmtfast_scale_row& scale = v.scales[k];
    if (i < scale.offset || i >= scale.offset + scale.length) continue;
    product *= factor_at(scale, v.tensors, i - scale.offset).value;
  }
  return static_cast<float>(product);
}

// The scales of this operator alone, which this block writes and reads.
__device__ void write_scales(const View& v, const OpWork& work, int64_t offset, int64_t length) {
  for (int64_t i = threadIdx.x; i < length; i += kBlockThreads) {
    v.saved[offset + i] = scale_entry(v, work, offset + i);
  }
}

__device__ void prepare_stencil(const View& v, const Item& item) {
  const OpRow& row = v.rows[item.op];
  const OpWork& work = v.work[item.op];
  if (item.tile < item.tiles) {
    sum_input(v, item);
    return;
  }
  if (row.row_scale >= 0) write_scales(v, work, row.row_scale, row.groups * row.rows);
  if (row.column_scale >= 0) write_scales(v, work, row.column_scale, row.groups * row.channels);
}

__device__ void prepare_panel(const View& v, const Item& item) {
  const Op op(v, item.op, item.group);
  const int64_t rows = op.s.rows, channels = op.s.channels;
  if (op.row_scale != nullptr) {
    write_scales(v, op.work, op.row.row_scale + item.group * rows, rows);
  }
  if (op.column_scale != nullptr) {
    write_scales(v, op.work, op.row.column_scale + item.group * channels, channels);
  }
  __syncthreads();
  const auto method = static_cast<Method>(op.work.method);
  if (method == Method::kSymbol) {
    prepare_symbol(v, op);
  } else if (method == Method::kSeparable) {
    prepare_separable(v, op);
  } else {
    prepare_matrix(v, op);
  }
}

__device__ void prepare_diagonal(const View& v, const Item& item) {
  const OpRow& row = v.rows[item.op];
  write_scales(v, v.work[item.op], row.row_scale, row.rows);
  __syncthreads();
  const float* scales = v.saved + row.row_scale;
  const int64_t at = largest_entry(scales, row.rows);
  if (threadIdx.x == 0) v.sigmas[item.op] = std::fabs(scales[at]);
}

// The first block writes the table of tensors for the launches that follow, and resets counters.
template <int kCapacity>
__global__ void __launch_bounds__(kBlockThreads, 1)
    prepare_kernel(View v, uint64_t* table, const __grid_constant__ Words<kCapacity> words) {
  const Item item = v.items[blockIdx.x];
  if (item.op < 0) {
    for (int64_t i = threadIdx.x; i < v.n_tensors; i += kBlockThreads) table[i] = words.word[i];
    for (int64_t i = threadIdx.x; i < v.n_counters; i += kBlockThreads) v.counters[i] = 0;
    return;
  }
  v.tensors = words.word;
  const auto method = static_cast<Method>(v.work[item.op].method);
  if (method == Method::kStencil) {
    prepare_stencil(v, item);
  } else if (method == Method::kDiagonal) {
    prepare_diagonal(v, item);
  } else {
    prepare_panel(v, item);
  }
}

}  // namespace

void launch_prepare(const View& view, uint64_t* table, const uint64_t* tensors, unsigned blocks,
                    Stream stream) {
  with_capacity(view.n_tensors, [&](auto capacity) {
    LMTFAST_LAUNCH(prepare_kernel<capacity>, blocks, kBlockThreads, 0, stream, view, table,
                   words_of<capacity>(tensors, view.n_tensors));
  });
}

}  // namespace lmtfast::cuda
