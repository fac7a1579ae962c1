// SPDX-License-Identifier: MIT
#include "ops/cpu/separable_operator.h"

namespace lmtfast::cpu {

SeparableOperator::SeparableOperator(const lmtfast_op_row& r, int64_t i, const lmtfast_tensor& w,
                                     const float* scales)
    : row(r),
      index(i),
      weight(w),
      row_scale(r.row_scale < 0 ? nullptr : scales + r.row_scale),
      column_scale(r.column_scale < 0 ? nullptr : scales + r.column_scale),
      taps(lmtfast::taps(r)),
      rank(r.rank),
      lanes(lanes_of(r.rank)),
      width(width_of(taps, lanes)),
      depth(taps * lanes),
      centre(r.identity == 0.0 ? 0 : centre_tap(r)),
      grid(r) {}

int64_t SeparableOperator::work() const {
  const int64_t grid_work = 3 * grid.points() * depth * width;
  return row.groups * (2 * lanes * entries() + 2 * row.rows * depth * width + grid_work);
}

std::vector<SeparableOperator> separable_operators(const lmtfast_network& network,
                                                   const lmtfast_tensor* tensors,
                                                   const float* scales,
                                                   const std::vector<int64_t>& which) {
  std::vector<SeparableOperator> ops;
  ops.reserve(which.size());
  for (const int64_t i : which) {
    const lmtfast_op_row& row = network.rows[i];
    ops.emplace_back(row, i, tensors[row.weight_slot], scales);
  }
  return ops;
}

void square_windows(const SeparableKernels& kernels, const SeparableOperator& op, const float* h,
                    int64_t begin, int64_t end, float* matrix) {
  std::fill_n(matrix, op.matrix_size(), 0.0f);
  Buffer<float> windows(kWindows * op.width);
  for (; begin < end; begin += kWindows) {
    const int64_t stop = std::min(begin + kWindows, end);
    op.grid.gather(h, op.lanes, 1.0f, begin, stop, windows.data(), op.width);
    kernels.square(stop - begin, op.depth, op.width, windows.data(), matrix);
  }
}

void add_parts(const float* parts, int64_t count, int64_t depth, int64_t width, float* matrix) {
  const int64_t size = depth * width;
  std::vector<double> sums(static_cast<size_t>(width));
  for (int64_t i = 0; i < depth; ++i) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t part = 0; part < count; ++part) {
      const float* from = parts + part * size + i * width;
#pragma omp simd
      for (int64_t j = i; j < depth; ++j) sums[j] += static_cast<double>(from[j]);
    }
    for (int64_t j = i; j < width; ++j) matrix[i * width + j] = static_cast<float>(sums[j]);
  }
  for (int64_t i = 0; i < depth; ++i) {
    for (int64_t j = 0; j < i; ++j) matrix[i * width + j] = matrix[j * width + i];
  }
}

}  // namespace lmtfast::cpu
