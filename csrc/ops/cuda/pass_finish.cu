// SPDX-License-Identifier: MIT
// What follows the pass: the tiles' sums are added, or the panels of separable operators go back
// through the weights; frequencies and vectors move on, sigma and what the gradient needs are recorded.
#include <cmath>

#include "ops/cuda/matrix.h"
#include "ops/cuda/separable_product.h"
#include "ops/cuda/spectral.h"
#include "ops/cuda/symbol.h"
#include "ops/cuda/word.h"

namespace lmtfast::cuda {
namespace {

// A stretch of the adjoint: the tiles' sums in their order, with column scale and identity.
__device__ void reduce_columns(const View& v, const Op& op, const Item& item) {
  LMTFAST_SHARED(double, inverses, [kPassColumns]);
  const Stencil& s = op.s;
  const OpWork& w = op.work;
  const PassShape& shape = w.pass;
  const bool symbol = static_cast<Method>(w.method) == Method::kSymbol;
  const int columns = static_cast<int>(shape.columns * shape.subsets);
  if (threadIdx.x < kPassColumns) {
    const int c = static_cast<int>(threadIdx.x);
    const double length = symbol   ? Symbol(v, op).length(c / 2)
                          : c == 0 ? DenseStep(v, op).length()
                                   : 0.0;
    inverses[c] = length == 0.0 ? 1.0 : 1.0 / length;
  }
  __syncthreads();
  const int64_t per_word = has_bit(op.weight, kBfloat16Bit) ? kPerWord<bfloat16> : kPerWord<float>;
  const int64_t group = item.group;
  const float* image = v.floats + w.image + group * s.rows * kPassColumns;
  const float identity = op.identity();
  const int32_t begin = item.tile * kSumColumns;
  for (int32_t i = threadIdx.x; i < kSumColumns * columns; i += kPassThreads) {
    const int32_t j = begin + i / columns;
    const int c = i % columns;
    if (j >= s.columns) break;
    const int64_t subset = c / shape.columns, size = shape.padded * shape.columns;
    const int64_t at = sum_index(s.columns, per_word, shape.columns, j, c % shape.columns);
    double sum = 0;
    for (int64_t tile = 0; tile < shape.tiles; ++tile) {
      const int64_t block = (group * shape.tiles + tile) * shape.subsets + subset;
      sum += v.doubles[w.powers + block] *
             static_cast<double>(v.floats[w.partial + block * size + at]);
    }
    const Column column = column_at(s, op.tap_major(), j);
    float value = static_cast<float>(sum * inverses[c]) * op.cs(column.channel);
    if (identity != 0.0f && column.tap == centre_tap(s) && column.channel < s.rows) {
      value += identity *
               static_cast<float>(image[static_cast<int64_t>(column.channel) * kPassColumns + c] *
                                  inverses[c]);
    }
    v.floats[w.back + (group * s.columns + j) * kPassColumns + c] = value;
  }
}

// The first blocks record what the gradient needs, one per operator; the others make the adjoint, and
// the last of a group to be done goes on to the new iterate.
__global__ void __launch_bounds__(kPassThreads, 1) finish_kernel(View v, unsigned records) {
  const Item item = v.items[blockIdx.x];
  const auto method = static_cast<Method>(v.work[item.op].method);
  if (blockIdx.x < records) {
    if (method == Method::kSymbol) {
      record_symbol(v, item.op);
    } else if (method == Method::kSeparable) {
      record_separable(v, item.op);
    } else {
      record_matrix(v, item.op);
    }
    return;
  }
  const Op op(v, item.op, item.group);
  if (method == Method::kSeparable) {
    panel_back_tile(v, op, item);
    return;
  }
  reduce_columns(v, op, item);
  if (!last_of(v.counters + op.work.counters + item.group, item.tiles)) return;
  if (method == Method::kSymbol) {
    finish_symbol(v, op);
  } else {
    finish_matrix(v, op, item.op);
  }
}

}  // namespace

void launch_pass_finish(const View& view, unsigned records, unsigned blocks, int64_t shared_bytes,
                        Stream stream) {
  LMTFAST_LAUNCH(finish_kernel, records + blocks, kPassThreads, static_cast<size_t>(shared_bytes),
                 stream, view, records);
}

}  // namespace lmtfast::cuda
