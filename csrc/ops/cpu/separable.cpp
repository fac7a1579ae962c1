// SPDX-License-Identifier: MIT
// The separable engine's step on the CPU, all operators at once, in phases of independent units:
// weight rows for the two passes, stretches of the grid for windows and stencils, groups for what
// is small. With the windows X of the patterns, (points, taps r), and the Gram matrix G of y,
//   ||A v||^2 = <X G, X>,   a stencil step is fold(X G),   new a = W^T y R^T X^T X,
// R the triangle of the patterns' QR. The first two share a product.
#include <cmath>
#include <limits>

#include "ops/cpu/separable_operator.h"

namespace lmtfast::cpu {
namespace {

// Power steps on the grid per step, as lmtfast/engines/separable.py has them.
constexpr int kGridSteps = 2;

// One group of one operator: its scratch, and what it carries from phase to phase.
struct Group {
  const SeparableOperator* op;
  int64_t number;                    // within the operator
  float* patterns[kGridSteps + 1];   // (inputs + 1, lanes), the last row zero: h after each step
  float* a;                          // (C, lanes)
  float* scaled_a;                   // diag(column scale) a over the largest column scale
  float* y;                          // (R, width)
  float* mixed;                      // (R, width)
  float* matrix;                     // (depth, width): G, then R^T X^T X
  float* parts;                      // Gram matrices of stretches of rows, or of points
  float* image;                      // X G, (points, width)
  float* pulled;                     // (row units, C, lanes)
  double column_peak, row_peak;      // largest scales
  double scale;                      // largest |y|
  double relative;                   // ||A v|| / scale
  double triangle[kLanes * kLanes];  // R over its length
};

// The largest of some values, NaN if one is NaN.
double largest_of(const double* values, int64_t count) {
  double largest = 0.0;
  for (int64_t i = 0; i < count && !std::isnan(largest); ++i) {
    if (!(values[i] <= largest)) largest = values[i];
  }
  return largest;
}

// 1 / x, or 1 where x does not divide.
double inverse_of(double x) { return x > 0.0 ? 1.0 / x : 1.0; }

// The power of two that brings `size` near one; 1 where there is none.
float balance(double size) {
  if (!(size > 0.0) || !std::isfinite(size)) return 1.0f;
  int exponent;
  std::frexp(size, &exponent);
  return static_cast<float>(std::ldexp(1.0, std::clamp(-exponent, -126, 127)));
}

double length_of(const double* values, int64_t count) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += values[i] * values[i];
  return std::sqrt(sum);
}

class SeparableStep {
 public:
  SeparableStep(const SpectralStep& call, std::vector<SeparableOperator> ops, int64_t threads);
  void run();

 private:
  void take(Arena& arena, Group& group, int64_t index);
  void prepare(Group& group);
  void apply(const Unit& unit);
  void normalise(const Unit& unit);
  void square_rows(const Unit& unit);
  void image(const Unit& unit, int step);
  void fold(const Unit& unit, int step);
  void orthonormalise(Group& group);
  void square_points(const Unit& unit);
  void mix(const Unit& unit);
  void pull(const Unit& unit);
  void finish(const Unit& unit);
  void record(size_t op, int64_t first_group);
  const float* state_of(const Group& group) const {
    const SeparableOperator& op = *group.op;
    return call_.state + op.row.state_offset +
           group.number * op.rank * (op.grid.inputs() + op.row.channels);
  }

  const SpectralStep& call_;
  const int64_t threads_;
  const SeparableKernels& kernels_;
  const std::vector<SeparableOperator> ops_;
  // Stretches of one group each, of weight rows per pass, of rows and points per Gram matrix, of
  // points and of inputs.
  Units group_units_, pass_units_, row_units_, shift_units_, point_units_, input_units_;
  std::vector<Group> groups_;
};

SeparableStep::SeparableStep(const SpectralStep& call, std::vector<SeparableOperator> ops,
                             int64_t threads)
    : call_(call),
      threads_(threads),
      kernels_(separable_kernels(best_isa())),
      ops_(std::move(ops)),
      group_units_(
          ops_, [](auto&) { return 1; }, [](auto&) { return 1; }),
      pass_units_(
          ops_, [](auto& op) { return op.row.rows; }, unit_rows),
      row_units_(
          ops_, [](auto& op) { return op.row.rows; },
          [](auto& op) { return unit_points(op.width); }),
      shift_units_(
          ops_, [](auto& op) { return op.grid.points(); },
          [](auto& op) { return unit_points(op.width); }),
      point_units_(
          ops_, [](auto& op) { return op.grid.points(); }, [](auto&) { return 2 * kWindows; }),
      input_units_(ops_, [](auto& op) { return op.grid.inputs(); }, [](auto&) { return 128; }) {
  for (const SeparableOperator& op : ops_) {
    for (int64_t group = 0; group < op.row.groups; ++group) {
      groups_.emplace_back();
      groups_.back().op = &op;
      groups_.back().number = group;
    }
  }
}

void SeparableStep::take(Arena& arena, Group& group, int64_t index) {
  const SeparableOperator& op = *group.op;
  for (float*& h : group.patterns) h = arena.take((op.grid.inputs() + 1) * op.lanes);
  group.a = arena.take(op.row.channels * op.lanes);
  group.scaled_a = arena.take(op.row.channels * op.lanes);
  group.y = arena.take(op.row.rows * op.width);
  group.mixed = arena.take(op.row.rows * op.width);
  group.matrix = arena.take(op.matrix_size());
  const int64_t parts = std::max(row_units_.count(index), shift_units_.count(index));
  group.parts = arena.take(parts * op.matrix_size());
  group.image = arena.take(op.grid.points() * op.width);
  group.pulled = arena.take(pass_units_.count(index) * op.row.channels * op.lanes);
}

void SeparableStep::run() {
  Arena arena;
  const auto take_all = [&] {
    for (size_t i = 0; i < groups_.size(); ++i) take(arena, groups_[i], static_cast<int64_t>(i));
  };
  take_all();
  Buffer<float> scratch(arena.used());
  arena.hand_out(scratch.data());
  take_all();
  const bool update = call_.new_state != nullptr;

  group_units_.each(threads_, [&](const Unit& unit) { prepare(groups_[unit.group]); });
  pass_units_.each(threads_, [&](const Unit& unit) { apply(unit); });
  group_units_.each(threads_, [&](const Unit& unit) { normalise(unit); });
  row_units_.each(threads_, [&](const Unit& unit) { square_rows(unit); });
  group_units_.each(threads_, [&](const Unit& unit) {
    const Group& group = groups_[unit.group];
    add_parts(group.parts, row_units_.count(unit.group), group.op->depth, group.op->width,
              group.matrix);
  });
  point_units_.each(threads_, [&](const Unit& unit) { image(unit, 0); });
  int64_t first = 0;
  for (size_t op = 0; op < ops_.size(); first += ops_[op++].row.groups) record(op, first);
  if (!update) return;
  input_units_.each(threads_, [&](const Unit& unit) { fold(unit, 1); });
  for (int step = 1; step < kGridSteps; ++step) {
    point_units_.each(threads_, [&](const Unit& unit) { image(unit, step); });
    input_units_.each(threads_, [&](const Unit& unit) { fold(unit, step + 1); });
  }
  group_units_.each(threads_, [&](const Unit& unit) { orthonormalise(groups_[unit.group]); });
  shift_units_.each(threads_, [&](const Unit& unit) { square_points(unit); });
  group_units_.each(threads_, [&](const Unit& unit) { mix(unit); });
  pass_units_.each(threads_, [&](const Unit& unit) { pull(unit); });
  group_units_.each(threads_, [&](const Unit& unit) { finish(unit); });
}

// Orthonormal channel vectors, and the patterns that go with them, of length one.
void SeparableStep::prepare(Group& group) {
  const SeparableOperator& op = *group.op;
  const int64_t inputs = op.grid.inputs(), channels = op.row.channels, lanes = op.lanes;
  const float* h = state_of(group);
  const float* a = h + inputs * op.rank;
  Buffer<double> basis(channels * lanes), moved(inputs * lanes);
  double triangle[kLanes * kLanes];
  const auto read = [&](const float* from, int64_t count, double* to) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < lanes; ++k) *to++ = k < op.rank ? *from++ : 0.0;
    }
  };
  read(a, channels, basis.data());
  kernels_.orthonormalise(channels, op.rank, lanes, basis.data(), triangle);
  read(h, inputs, moved.data());
  kernels_.turn(inputs, lanes, triangle, moved.data());
  const double factor = inverse_of(length_of(moved.data(), inputs * lanes));
  for (int64_t i = 0; i < inputs * lanes; ++i) {
    group.patterns[0][i] = static_cast<float>(moved.data()[i] * factor);
  }
  for (float* patterns : group.patterns) {
    for (int64_t k = 0; k < lanes; ++k) patterns[inputs * lanes + k] = 0.0f;
  }
  group.column_peak = group.row_peak = 0.0;
  for (int64_t c = 0; c < channels; ++c) {
    group.column_peak = std::max(group.column_peak, std::abs(op.scale_of_column(group.number, c)));
  }
  for (int64_t r = 0; r < op.row.rows; ++r) {
    group.row_peak = std::max(group.row_peak, std::abs(op.scale_of_row(group.number, r)));
  }
  const double inverse = inverse_of(group.column_peak);
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = op.scale_of_column(group.number, c) * inverse;
    for (int64_t k = 0; k < lanes; ++k) {
      const double entry = basis.data()[c * lanes + k];
      group.a[c * lanes + k] = static_cast<float>(entry);
      group.scaled_a[c * lanes + k] = static_cast<float>(entry * scale);
    }
  }
}

// y = W_t a, in the units of the weights.
void SeparableStep::apply(const Unit& unit) {
  Group& group = groups_[unit.group];
  const SeparableOperator& op = *group.op;
  op.each_rows(kernels_, group.number, unit.begin, unit.end,
               [&](int64_t row, const KernelRows<const float>& w) {
                 kernels_.apply(w, op.lanes, group.scaled_a, group.y + row * op.width, op.width);
               });
  const double peak = group.column_peak > 0.0 ? group.column_peak : 1.0;
  for (int64_t r = unit.begin; r < unit.end; ++r) {
    float* y = group.y + r * op.width;
    kernels_.rescale(op.depth, op.scale_of_row(group.number, r) * peak, y);
    if (op.row.identity != 0.0 && r < op.row.channels) {
      for (int64_t k = 0; k < op.lanes; ++k) {
        float& entry = y[op.centre * op.lanes + k];
        entry = static_cast<float>(entry + op.row.identity * group.a[r * op.lanes + k]);
      }
    }
    std::fill(y + op.depth, y + op.width, 0.0f);
  }
  pass_units_.find(
      unit, kernels_.largest((unit.end - unit.begin) * op.width, group.y + unit.begin * op.width));
}

// y over its largest entry: squares neither overflow nor underflow.
void SeparableStep::normalise(const Unit& unit) {
  Group& group = groups_[unit.group];
  group.scale = largest_of(pass_units_.found(unit.group), pass_units_.count(unit.group));
  const double inverse = std::isnan(group.scale) ? group.scale : inverse_of(group.scale);
  kernels_.rescale(group.op->row.rows * group.op->width, inverse, group.y);
}

void SeparableStep::square_rows(const Unit& unit) {
  Group& group = groups_[unit.group];
  const SeparableOperator& op = *group.op;
  float* part = group.parts + unit.number * op.matrix_size();
  std::fill_n(part, op.matrix_size(), 0.0f);
  kernels_.square(unit.end - unit.begin, op.depth, op.width, group.y + unit.begin * op.width, part);
}

// X G at a stretch of points, X the windows of the patterns after `step` stencil steps; at step 0
// its product with X as well.
void SeparableStep::image(const Unit& unit, int step) {
  Group& group = groups_[unit.group];
  const SeparableOperator& op = *group.op;
  const float factor =
      step == 0
          ? 1.0f
          : balance(largest_of(input_units_.found(unit.group), input_units_.count(unit.group)));
  Buffer<float> windows(kWindows * op.width);
  double squares = 0.0;
  for (int64_t begin = unit.begin; begin < unit.end; begin += kWindows) {
    const int64_t end = std::min(begin + kWindows, unit.end);
    float* image = group.image + begin * op.width;
    op.grid.gather(group.patterns[step], op.lanes, factor, begin, end, windows.data(), op.width);
    kernels_.multiply(end - begin, op.depth, op.width, windows.data(), group.matrix, image);
    if (step == 0) squares += kernels_.dot((end - begin) * op.width, windows.data(), image);
  }
  point_units_.find(unit, squares);
}

void SeparableStep::fold(const Unit& unit, int step) {
  Group& group = groups_[unit.group];
  const SeparableOperator& op = *group.op;
  float* h = group.patterns[step];
  op.grid.fold(kernels_, group.image, op.width, op.lanes, unit.begin, unit.end, h);
  input_units_.find(
      unit, kernels_.largest((unit.end - unit.begin) * op.lanes, h + unit.begin * op.lanes));
}

// The patterns become orthonormal, their triangle is kept at length one.
void SeparableStep::orthonormalise(Group& group) {
  const SeparableOperator& op = *group.op;
  const int64_t size = op.grid.inputs() * op.lanes;
  float* h = group.patterns[kGridSteps];
  Buffer<double> basis(size);
  for (int64_t i = 0; i < size; ++i) basis.data()[i] = h[i];
  kernels_.orthonormalise(op.grid.inputs(), op.rank, op.lanes, basis.data(), group.triangle);
  for (int64_t i = 0; i < size; ++i) h[i] = static_cast<float>(basis.data()[i]);
  const double inverse = inverse_of(length_of(group.triangle, op.rank * op.lanes));
  for (int64_t i = 0; i < op.rank * op.lanes; ++i) group.triangle[i] *= inverse;
}

void SeparableStep::square_points(const Unit& unit) {
  Group& group = groups_[unit.group];
  const SeparableOperator& op = *group.op;
  square_windows(kernels_, op, group.patterns[kGridSteps], unit.begin, unit.end,
                 group.parts + unit.number * op.matrix_size());
}

// R^T X^T X, R^T within each tap.
void SeparableStep::mix(const Unit& unit) {
  Group& group = groups_[unit.group];
  const SeparableOperator& op = *group.op;
  add_parts(group.parts, shift_units_.count(unit.group), op.depth, op.width, group.matrix);
  std::vector<double> row(static_cast<size_t>(op.lanes * op.width));
  for (int64_t t = 0; t < op.taps; ++t) {
    float* rows = group.matrix + t * op.lanes * op.width;
    std::fill(row.begin(), row.end(), 0.0);
    for (int64_t k = 0; k < op.rank; ++k) {
      for (int64_t j = 0; j <= k; ++j) {
        const double r = group.triangle[j * op.lanes + k];
        double* to = row.data() + k * op.width;
#pragma omp simd
        for (int64_t i = 0; i < op.width; ++i) {
          to[i] += r * static_cast<double>(rows[j * op.width + i]);
        }
      }
    }
    for (int64_t i = 0; i < op.lanes * op.width; ++i) rows[i] = static_cast<float>(row[i]);
  }
}

// A stretch's share of W^T y R^T X^T X, row scales over the largest one.
void SeparableStep::pull(const Unit& unit) {
  Group& group = groups_[unit.group];
  const SeparableOperator& op = *group.op;
  float* mixed = group.mixed + unit.begin * op.width;
  kernels_.multiply(unit.end - unit.begin, op.depth, op.width, group.y + unit.begin * op.width,
                    group.matrix, mixed);
  float* pulled = group.pulled + unit.number * op.row.channels * op.lanes;
  std::fill_n(pulled, op.row.channels * op.lanes, 0.0f);
  const double inverse = inverse_of(group.row_peak);
  Buffer<float> scaled(op.row_scale == nullptr ? 0 : (unit.end - unit.begin) * op.width);
  if (op.row_scale != nullptr) {
    for (int64_t r = unit.begin; r < unit.end; ++r) {
      const double factor = op.scale_of_row(group.number, r) * inverse;
      for (int64_t i = 0; i < op.width; ++i, ++mixed) {
        scaled.data()[(r - unit.begin) * op.width + i] = static_cast<float>(*mixed * factor);
      }
    }
    mixed = scaled.data();
  }
  op.each_rows(kernels_, group.number, unit.begin, unit.end,
               [&](int64_t row, const KernelRows<const float>& w) {
                 kernels_.pull(w, op.lanes, mixed + (row - unit.begin) * op.width, op.width,
                               pulled);
               });
}

// The new iterate; the old one where that is zero or not finite.
void SeparableStep::finish(const Unit& unit) {
  Group& group = groups_[unit.group];
  const SeparableOperator& op = *group.op;
  const int64_t inputs = op.grid.inputs(), channels = op.row.channels;
  const int64_t size = channels * op.lanes, parts = pass_units_.count(unit.group);
  const double identity = op.row.identity * inverse_of(group.row_peak);
  std::vector<double> a(static_cast<size_t>(size), 0.0);
  for (int64_t part = 0; part < parts; ++part) {
    const float* pulled = group.pulled + part * size;
    for (int64_t i = 0; i < size; ++i) a[i] += static_cast<double>(pulled[i]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double scale = op.scale_of_column(group.number, c);
    const bool diagonal = identity != 0.0 && c < op.row.rows;
    const float* image = group.mixed + (diagonal ? c * op.width + op.centre * op.lanes : 0);
    for (int64_t k = 0; k < op.lanes; ++k) {
      double& entry = a[c * op.lanes + k];
      entry *= scale;
      if (diagonal) entry += identity * static_cast<double>(image[k]);
    }
  }
  const double length = length_of(a.data(), size);
  bool usable = length > 0.0 && std::isfinite(length);
  const float* h = group.patterns[kGridSteps];
  for (int64_t i = 0; i < inputs * op.lanes; ++i) usable = usable && std::isfinite(h[i]);
  const float* from = state_of(group);
  float* to = call_.new_state + (from - call_.state);
  if (!usable) {
    std::copy_n(from, op.rank * (inputs + channels), to);
    return;
  }
  for (int64_t i = 0; i < inputs; ++i) {
    for (int64_t k = 0; k < op.rank; ++k) *to++ = h[i * op.lanes + k];
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t k = 0; k < op.rank; ++k) {
      *to++ = static_cast<float>(a[c * op.lanes + k] / length);
    }
  }
}

// Sigma, and what the gradient needs, of the group with the largest one.
void SeparableStep::record(size_t op_index, int64_t first_group) {
  const SeparableOperator& op = ops_[op_index];
  double sigma = -1.0;
  int64_t best = first_group;
  for (int64_t i = first_group; i < first_group + op.row.groups && !std::isnan(sigma); ++i) {
    double squares = 0.0;
    for (int64_t part = 0; part < point_units_.count(i); ++part)
      squares += point_units_.found(i)[part];
    groups_[i].relative = std::sqrt(squares < 0.0 ? 0.0 : squares);
    const double norm = groups_[i].scale * groups_[i].relative;
    if (!(norm <= sigma)) sigma = norm, best = i;
  }
  const Group& group = groups_[best];
  call_.sigmas[op.index] = static_cast<float>(sigma);
  float* to = call_.saved + op.row.saved_offset;
  *to++ = static_cast<float>(group.number);
  *to++ = static_cast<float>(group.relative);
  const auto copy = [&](const float* from, int64_t rows, int64_t stride, int64_t vectors) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < vectors; ++j) {
        for (int64_t k = 0; k < op.rank; ++k) *to++ = from[i * stride + j * op.lanes + k];
      }
    }
  };
  copy(group.patterns[0], op.grid.inputs(), op.lanes, 1);
  copy(group.a, op.row.channels, op.lanes, 1);
  copy(group.y, op.row.rows, op.width, op.taps);
}

}  // namespace

void separable_step(const SpectralStep& step) {
  each_team(separable_operators(step.network, step.tensors, step.saved, step.which), step.threads,
            [&](std::vector<SeparableOperator> ops, int64_t threads) {
              SeparableStep(step, std::move(ops), threads).run();
            });
}

}  // namespace lmtfast::cpu
