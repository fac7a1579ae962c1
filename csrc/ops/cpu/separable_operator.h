// SPDX-License-Identifier: MIT
// One operator as the separable engine runs it, its work cut into units, and the loop over units
// that the step and the gradient share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/buffer.h"
#include "core/parallel.h"
#include "ops/cpu/grid.h"
#include "ops/cpu/separable_kernels.h"
#include "ops/spectral.h"

namespace lmtfast::cpu {

// Points, or rows, of one unit of dense products: large against the Gram matrix that a unit may
// have to write.
inline int64_t unit_points(int64_t width) { return std::max<int64_t>(128, 2 * width); }
// Weights of one unit of a pass, and rows, whose terms a unit adds up in floats.
constexpr int64_t kUnitWeights = 1 << 16;
constexpr int64_t kUnitRows = 64;
// Rows that are widened at a time.
constexpr int64_t kWidenedRows = 9;
// Windows that a register tile's caller keeps in the first cache.
constexpr int64_t kWindows = 48;
// Multiply-adds that pay for a thread.
constexpr int64_t kWorkPerThread = 1 << 18;

struct SeparableOperator {
  SeparableOperator(const lmtfast_op_row& row, int64_t index, const lmtfast_tensor& weight,
                    const float* scales);

  const lmtfast_op_row& row;
  int64_t index;
  const lmtfast_tensor& weight;
  const float* row_scale;                   // null: ones
  const float* column_scale;                // null: ones
  int64_t taps, rank, lanes, width, depth;  // depth = taps * lanes
  int64_t centre;                           // the tap of the identity
  Grid grid;

  int64_t entries() const { return row.rows * row.channels * taps; }
  // Of a matrix over taps and patterns.
  int64_t matrix_size() const { return depth * width; }
  // Multiply-adds of a step.
  int64_t work() const;

  double scale_of_row(int64_t group, int64_t r) const {
    return row_scale == nullptr ? 1.0 : row_scale[group * row.rows + r];
  }
  double scale_of_column(int64_t group, int64_t c) const {
    return column_scale == nullptr ? 1.0 : column_scale[group * row.channels + c];
  }

  // Calls body(first, rows) with float rows [begin, end) of a group, a few at a time where they
  // have to be widened.
  template <class Body>
  void each_rows(const SeparableKernels& kernels, int64_t group, int64_t begin, int64_t end,
                 Body&& body) const {
    const int64_t size = row.channels * taps, start = (group * row.rows + begin) * size;
    const bool tap_major = weight.tap_major != 0;
    if (weight.dtype == LMTFAST_FLOAT32) {
      const float* data = static_cast<const float*>(weight.data) + start;
      body(begin, KernelRows<const float>{data, end - begin, row.channels, taps, tap_major});
      return;
    }
    const uint16_t* data = static_cast<const uint16_t*>(weight.data) + start;
    Buffer<float> wide(std::min(kWidenedRows, end - begin) * size);
    for (int64_t r = begin; r < end; r += kWidenedRows, data += kWidenedRows * size) {
      const int64_t count = std::min(kWidenedRows, end - r);
      kernels.widen(count * size, data, wide.data());
      body(r, KernelRows<const float>{wide.data(), count, row.channels, taps, tap_major});
    }
  }
};

// Stretches of at most length(op) of the extent(op) of every group of every operator, and a number
// that each stretch finds. Groups are counted through all operators.
class Units {
 public:
  struct Unit {
    int64_t group, begin, end;
    int64_t number;  // among the stretches of the group
    int64_t place;   // among all
  };

  template <class Extent, class Length>
  Units(const std::vector<SeparableOperator>& ops, Extent&& extent, Length&& length) {
    for (const SeparableOperator& op : ops) {
      const int64_t whole = extent(op), most = length(op), parts = (whole + most - 1) / most;
      for (int64_t group = 0; group < op.row.groups; ++group) {
        const int64_t index = static_cast<int64_t>(first_.size());
        first_.push_back(static_cast<int64_t>(units_.size()));
        for (int64_t i = 0; i < parts; ++i) {
          units_.push_back({index, whole * i / parts, whole * (i + 1) / parts, i,
                            static_cast<int64_t>(units_.size())});
        }
      }
    }
    first_.push_back(static_cast<int64_t>(units_.size()));
    found_.resize(units_.size());
  }

  int64_t count(int64_t group) const { return first_[group + 1] - first_[group]; }
  void find(const Unit& unit, double value) { found_[unit.place] = value; }
  // What the stretches of a group found.
  const double* found(int64_t group) const { return found_.data() + first_[group]; }

  // body(unit) for all units; many small ones share a task. What a unit computes depends on nothing
  // but itself, so neither this nor the number of threads shows in the results.
  template <class Body>
  void each(int64_t threads, Body&& body) const {
    constexpr int64_t kTasks = 512;
    const int64_t count = static_cast<int64_t>(units_.size()), tasks = std::min(count, kTasks);
    parallel_for(tasks, threads, [&](int64_t task) {
      for (int64_t i = count * task / tasks; i < count * (task + 1) / tasks; ++i) body(units_[i]);
    });
  }

 private:
  std::vector<Unit> units_;
  std::vector<int64_t> first_;
  std::vector<double> found_;
};
using Unit = Units::Unit;

// Rows of a unit of a pass over the weights.
inline int64_t unit_rows(const SeparableOperator& op) {
  return std::clamp<int64_t>(kUnitWeights / (op.row.channels * op.taps), 1, kUnitRows);
}

std::vector<SeparableOperator> separable_operators(const lmtfast_network& network,
                                                   const lmtfast_tensor* tensors,
                                                   const float* scales,
                                                   const std::vector<int64_t>& which);

// Calls body(operators, threads) on sets that make up `ops`: those whose work exceeds a thread's
// share together with all threads, the others one by one on one thread each, whose caches then hold
// what the next phase reads.
template <class Body>
void each_team(std::vector<SeparableOperator> ops, int64_t requested, Body&& body) {
  int64_t work = 0;
  for (const SeparableOperator& op : ops) work += op.work();
  const int64_t threads = choose_threads(requested, work, kWorkPerThread);
  std::vector<SeparableOperator> together;
  std::vector<std::vector<SeparableOperator>> alone;
  for (SeparableOperator& op : ops) {
    if (threads > 1 && op.work() > work / (2 * threads)) {
      together.push_back(std::move(op));
    } else {
      alone.emplace_back().push_back(std::move(op));
    }
  }
  if (!together.empty()) body(std::move(together), threads);
  // The largest first: the last to end is then a small one.
  std::stable_sort(alone.begin(), alone.end(), [](const auto& a, const auto& b) {
    return a.front().work() > b.front().work();
  });
  parallel_for(static_cast<int64_t>(alone.size()), threads,
               [&](int64_t i) { body(std::move(alone[i]), 1); });
}

// The Gram matrix (depth, width) of the windows of h at points [begin, end), right half.
void square_windows(const SeparableKernels& kernels, const SeparableOperator& op, const float* h,
                    int64_t begin, int64_t end, float* matrix);

// A symmetric (depth, depth) matrix, rows of `width`, from the sums of its parts' right halves.
void add_parts(const float* parts, int64_t count, int64_t depth, int64_t width, float* matrix);

// Scratch in one allocation: take() adds up in a first round and hands out in a second.
class Arena {
 public:
  float* take(int64_t size) {
    float* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (size + kLine - 1) / kLine * kLine;
    return at;
  }
  int64_t used() const { return used_; }
  void hand_out(float* base) {
    base_ = base;
    used_ = 0;
  }

 private:
  static constexpr int64_t kLine = 16;
  float* base_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace lmtfast::cpu
