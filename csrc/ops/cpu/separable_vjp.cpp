// SPDX-License-Identifier: MIT
// Gradient of the separable engine's sigma on the CPU. In the acting kernel of the saved group it is
// <V_t, a_c>, V = y X^T X over what ||A v|| is in units of y's scale; the other groups' is zero.
#include <cmath>

#include "ops/cpu/separable_operator.h"

namespace lmtfast::cpu {
namespace {

// The saved group of one operator.
struct Winner {
  const SeparableOperator* op;
  int64_t group;    // within the operator
  int64_t place;    // among the groups of all operators
  bool wanted;      // whether anything here has a gradient to compute
  bool scales;      // whether the scales have
  bool add;         // whether an earlier operator has written to the tensor
  double factor;    // gradient in sigma over ||A v||, in units of y's scale
  const float* y;   // as saved, (R, taps, rank)
  float* patterns;  // (inputs + 1, lanes), the last row zero
  float* a;         // (C, lanes)
  float* scaled_a;  // diag(column scale) a
  float* matrix;    // (depth, width): X^T X
  float* parts;     // of stretches of points
  float* pulled;    // (row units, C, lanes)
};

class SeparableVjp {
 public:
  SeparableVjp(const SpectralVjp& call, std::vector<SeparableOperator> ops, int64_t threads);
  void run();

 private:
  void take(Arena& arena, Winner& winner);
  void prepare(Winner& winner);
  void write(const Unit& unit, const Winner& winner);
  void rows_of_scales(const Unit& unit, const Winner& winner, const float* image);
  void columns_of_scales(const Winner& winner);
  float* grad_of(const SeparableOperator& op) const {
    return static_cast<float*>(call_.grads[op.row.weight_slot].data);
  }

  const SpectralVjp& call_;
  const int64_t threads_;
  const SeparableKernels& kernels_;
  const std::vector<SeparableOperator> ops_;
  Units shift_units_, pass_units_;
  std::vector<Winner> winners_;
  std::vector<int64_t> winner_of_;  // by group of all operators
};

SeparableVjp::SeparableVjp(const SpectralVjp& call, std::vector<SeparableOperator> ops,
                           int64_t threads)
    : call_(call),
      threads_(threads),
      kernels_(separable_kernels(best_isa())),
      ops_(std::move(ops)),
      shift_units_(
          ops_, [](auto& op) { return op.grid.points(); },
          [](auto& op) { return unit_points(op.width); }),
      pass_units_(ops_, [](auto& op) { return op.row.rows; }, unit_rows) {
  for (const SeparableOperator& op : ops_) {
    const float* saved = call.saved + op.row.saved_offset;
    require(saved[0] >= 0.0f && saved[0] < static_cast<float>(op.row.groups),
            "the group that a step saved", static_cast<int64_t>(saved[0]), "saved");
    Winner winner{};
    winner.op = &op;
    winner.group = static_cast<int64_t>(saved[0]);
    winner.place = static_cast<int64_t>(winner_of_.size()) + winner.group;
    winner.scales = call.grad_scales != nullptr && (op.row_scale || op.column_scale);
    winner.wanted = winner.scales || grad_of(op) != nullptr;
    winner.add = call.accumulate[op.index] != 0;
    const double norm = saved[1];
    winner.factor = call.grad_sigmas[op.index] / (norm > 0.0 ? norm : 1.0);
    winner_of_.insert(winner_of_.end(), op.row.groups, static_cast<int64_t>(winners_.size()));
    winners_.push_back(winner);
  }
}

void SeparableVjp::take(Arena& arena, Winner& winner) {
  const SeparableOperator& op = *winner.op;
  winner.patterns = arena.take((op.grid.inputs() + 1) * op.lanes);
  winner.a = arena.take(op.row.channels * op.lanes);
  winner.scaled_a = arena.take(op.row.channels * op.lanes);
  winner.matrix = arena.take(op.matrix_size());
  winner.parts = arena.take(shift_units_.count(winner.place) * op.matrix_size());
  winner.pulled = arena.take(pass_units_.count(winner.place) * op.row.channels * op.lanes);
}

void SeparableVjp::run() {
  Arena arena;
  const auto take_all = [&] {
    for (Winner& winner : winners_) take(arena, winner);
  };
  take_all();
  Buffer<float> scratch(arena.used());
  arena.hand_out(scratch.data());
  take_all();
  const int64_t count = static_cast<int64_t>(winners_.size());

  parallel_for(count, threads_, [&](int64_t i) { prepare(winners_[i]); });
  shift_units_.each(threads_, [&](const Unit& unit) {
    const Winner& winner = winners_[winner_of_[unit.group]];
    if (unit.group != winner.place || !winner.wanted) return;
    square_windows(kernels_, *winner.op, winner.patterns, unit.begin, unit.end,
                   winner.parts + unit.number * winner.op->matrix_size());
  });
  parallel_for(count, threads_, [&](int64_t i) {
    const Winner& winner = winners_[i];
    if (!winner.wanted) return;
    add_parts(winner.parts, shift_units_.count(winner.place), winner.op->depth, winner.op->width,
              winner.matrix);
  });
  pass_units_.each(threads_, [&](const Unit& unit) {
    const Winner& winner = winners_[winner_of_[unit.group]];
    if (winner.wanted) write(unit, winner);
  });
  parallel_for(count, threads_, [&](int64_t i) { columns_of_scales(winners_[i]); });
}

// The saved vectors as rows of lanes.
void SeparableVjp::prepare(Winner& winner) {
  const SeparableOperator& op = *winner.op;
  const float* from = call_.saved + op.row.saved_offset + 2;
  const auto read = [&](float* to, int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < op.lanes; ++k) to[i * op.lanes + k] = k < op.rank ? *from++ : 0.0f;
    }
  };
  read(winner.patterns, op.grid.inputs());
  std::fill_n(winner.patterns + op.grid.inputs() * op.lanes, op.lanes, 0.0f);
  read(winner.a, op.row.channels);
  winner.y = from;
  for (int64_t c = 0; c < op.row.channels; ++c) {
    for (int64_t k = 0; k < op.lanes; ++k) {
      const int64_t i = c * op.lanes + k;
      winner.scaled_a[i] = static_cast<float>(winner.a[i] * op.scale_of_column(winner.group, c));
    }
  }
}

// The gradient in a stretch of rows, and what it adds to that in the scales.
void SeparableVjp::write(const Unit& unit, const Winner& winner) {
  const SeparableOperator& op = *winner.op;
  const int64_t size = op.row.channels * op.taps, count = unit.end - unit.begin;
  const int64_t group = unit.group - winner.place + winner.group;
  float* grad = grad_of(op);
  if (grad != nullptr) grad += (group * op.row.rows + unit.begin) * size;
  if (group != winner.group) {
    if (grad != nullptr && !winner.add) std::fill_n(grad, count * size, 0.0f);
    return;
  }
  Buffer<float> y(count * op.width), image(count * op.width);
  const float* from = winner.y + unit.begin * op.taps * op.rank;
  for (int64_t r = 0; r < count; ++r) {
    float* to = y.data() + r * op.width;
    std::fill_n(to, op.width, 0.0f);
    for (int64_t t = 0; t < op.taps; ++t) {
      for (int64_t k = 0; k < op.rank; ++k) to[t * op.lanes + k] = *from++;
    }
  }
  kernels_.multiply(count, op.depth, op.width, y.data(), winner.matrix, image.data());
  if (winner.scales && op.row_scale != nullptr) rows_of_scales(unit, winner, image.data());
  for (int64_t r = 0; r < count; ++r) {
    const double factor = winner.factor * op.scale_of_row(group, unit.begin + r);
    for (int64_t i = 0; i < op.width; ++i) {
      float& entry = image.data()[r * op.width + i];
      entry = static_cast<float>(entry * factor);
    }
  }
  if (grad != nullptr) {
    const KernelRows<float> rows{grad, count, op.row.channels, op.taps, op.weight.tap_major != 0};
    kernels_.outer(rows, op.lanes, image.data(), op.width, winner.scaled_a, winner.add);
  }
  if (!winner.scales || op.column_scale == nullptr) return;
  float* pulled = winner.pulled + unit.number * op.row.channels * op.lanes;
  std::fill_n(pulled, op.row.channels * op.lanes, 0.0f);
  op.each_rows(
      kernels_, group, unit.begin, unit.end, [&](int64_t row, const KernelRows<const float>& w) {
        kernels_.pull(w, op.lanes, image.data() + (row - unit.begin) * op.width, op.width, pulled);
      });
}

// In a row's scale: <V, W diag(column scale) a>.
void SeparableVjp::rows_of_scales(const Unit& unit, const Winner& winner, const float* image) {
  const SeparableOperator& op = *winner.op;
  Buffer<float> y((unit.end - unit.begin) * op.width);
  op.each_rows(kernels_, winner.group, unit.begin, unit.end,
               [&](int64_t row, const KernelRows<const float>& w) {
                 kernels_.apply(w, op.lanes, winner.scaled_a,
                                y.data() + (row - unit.begin) * op.width, op.width);
               });
  double* to = call_.grad_scales + op.row.row_scale + winner.group * op.row.rows;
  for (int64_t r = 0; r < unit.end - unit.begin; ++r) {
    double sum = 0.0;
    for (int64_t i = r * op.width; i < r * op.width + op.depth; ++i) {
      sum += static_cast<double>(image[i]) * static_cast<double>(y.data()[i]);
    }
    to[unit.begin + r] += winner.factor * sum;
  }
}

// In a column's scale: <a, W^T diag(row scale) V>.
void SeparableVjp::columns_of_scales(const Winner& winner) {
  const SeparableOperator& op = *winner.op;
  if (!winner.scales || op.column_scale == nullptr) return;
  const int64_t size = op.row.channels * op.lanes, parts = pass_units_.count(winner.place);
  double* to = call_.grad_scales + op.row.column_scale + winner.group * op.row.channels;
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0.0;
    for (int64_t part = 0; part < parts; ++part) {
      sum += static_cast<double>(winner.pulled[part * size + i]);
    }
    to[i / op.lanes] += sum * static_cast<double>(winner.a[i]);
  }
}

}  // namespace

void separable_vjp(const SpectralVjp& vjp) {
  std::vector<SeparableOperator> first, later;
  for (SeparableOperator& op :
       separable_operators(vjp.network, vjp.tensors, vjp.saved, vjp.which)) {
    (vjp.accumulate[op.index] ? later : first).push_back(std::move(op));
  }
  const auto run = [&](std::vector<SeparableOperator> ops, int64_t threads) {
    SeparableVjp(vjp, std::move(ops), threads).run();
  };
  each_team(std::move(first), vjp.threads, run);
  // Operators that add to the same tensor take turns, in the order of the table.
  for (SeparableOperator& op : later) {
    std::vector<SeparableOperator> one;
    one.push_back(std::move(op));
    each_team(std::move(one), vjp.threads, run);
  }
}

}  // namespace lmtfast::cpu
