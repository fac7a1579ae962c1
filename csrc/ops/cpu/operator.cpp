// SPDX-License-Identifier: MIT
// Engine `operator`: v <- A^T A v normalised in between, and the gradient u v^T.
//
// All operators advance together in waves of bounded memory: while one wave multiplies for the
// first time, the wave before multiplies for the second, its weights still in cache. Tasks of a
// stage are independent; sums that cross tasks are kept per fixed chunk and added in order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "ops/cpu/task_list.h"
#include "ops/cpu/waves.h"

namespace lmtfast::cpu {
namespace {

// Vectors of one side of a stencil, as lines of equal length.
struct Side {
  int64_t lines, length;
  int64_t entries() const { return lines * length; }
  // Lines of a task, and how many tasks there are.
  int64_t lines_of_part() const { return std::max<int64_t>(1, kChunk / length); }
  int64_t parts() const { return (lines + lines_of_part() - 1) / lines_of_part(); }
};

Side input_side(const Convolution& op) { return {op.row.groups * op.row.channels, op.inputs()}; }
Side output_side(const Convolution& op) { return {op.row.groups * op.row.rows, op.outputs()}; }

double root(double sum_of_squares) {
  // Squares of finite floats are finite in double.
  return std::isfinite(sum_of_squares) ? std::sqrt(sum_of_squares)
                                       : std::numeric_limits<double>::quiet_NaN();
}

// Factor of the unit vector; zero stays zero.
double reciprocal(double norm) { return norm == 0.0 ? 1.0 : 1.0 / norm; }

// An operator and its vectors during a call.
struct Power {
  Convolution op;
  int64_t index;
  float *image, *vector;  // u and v, as saved
  // What the first product multiplies, and its norm: the iterate as it is, or v.
  const float* entered = nullptr;
  double entered_norm = 0.0;
  float* planes = nullptr;
  float* panels = nullptr;
  std::vector<double> squares;  // of one vector, in parts
  double state_norm = 0.0, image_norm = 0.0, back_norm = 0.0;

  Power(const Convolution& o, int64_t i, float* saved) : op(o), index(i), image(saved) {
    vector = saved + image_side().entries();
    squares.resize(static_cast<size_t>(
        std::max({vector_side().parts(), image_squares(op), adjoint_squares(op)})));
  }
  bool forward() const { return op.row.transposed == 0; }
  // A maps the vector side to the image side.
  Side vector_side() const { return forward() ? input_side(op) : output_side(op); }
  Side image_side() const { return forward() ? output_side(op) : input_side(op); }

  double norm_of(int64_t parts) const {
    double sum = 0.0;
    for (int64_t i = 0; i < parts; ++i) sum += squares[static_cast<size_t>(i)];
    return root(sum);
  }
  int64_t product_squares(bool image) const {
    return image ? image_squares(op) : adjoint_squares(op);
  }
  // Whether products with the iterate as it is stay as far from overflow as those with v.
  bool ordinary() const { return state_norm > 1e-6 && state_norm < 1e6; }
};

enum class Stage { kEnter, kNormalise, kFirst, kTurn, kKeep, kSecond, kLeave };

struct Task {
  Stage stage;
  size_t power;
  Block block;  // of lines, [first, last), except in products
};

class Step {
 public:
  Step(const SpectralStep& step, const ConvolutionKernels& kernels)
      : step_(step), kernels_(kernels) {
    for (const int64_t i : step.which) {
      const lmtfast_op_row& row = step.network.rows[i];
      const Convolution op(row, step.tensors[row.weight_slot], step.saved);
      powers_.emplace_back(op, i, step.saved + row.saved_offset);
      waves_.add(op, panel_floats(op, kernels));
    }
  }

  void run() {
    const size_t waves = waves_.count();
    int64_t work = 0, memory = 0;
    for (const Power& p : powers_) {
      work += p.op.multiply_adds() * (moves() ? 2 : 1);
      memory = std::max(memory, workspace_floats(p.op, kernels_));
    }
    Workers workers(choose_threads(step_.threads, work, kGrain), memory);
    const auto execute = [this](const Task& task, float* space) { perform(task, space); };
    std::vector<Task> tasks;
    // Wave s enters, wave s - 1 multiplies by A, wave s - 2 by A^T.
    for (size_t s = 0; s <= waves + (moves() ? 1 : 0); ++s) {
      tasks.clear();
      add_products(tasks, s, workers.threads() * kTasksPerThread);
      workers.run(tasks, execute);
      tasks.clear();
      if (moves()) {
        for_wave(s - 2, [&](Power& p, size_t i) {
          p.back_norm = p.norm_of(p.product_squares(!p.forward()));
          step_.sigmas[p.index] = static_cast<float>(p.back_norm);
          add_lines(tasks, Stage::kLeave, i, p.vector_side());
        });
      }
      for_wave(s - 1, [&](Power& p, size_t i) {
        p.image_norm = p.norm_of(p.product_squares(p.forward()));
        if (!moves()) step_.sigmas[p.index] = sigma_before(p);
        add_lines(tasks, Stage::kTurn, i, p.image_side());
        if (!moves()) add_lines(tasks, Stage::kKeep, i, p.vector_side());
      });
      waves_.place(s, [&](size_t i, float* planes, float* panels) {
        Power& p = powers_[i];
        p.planes = planes;
        p.panels = panels;
        add_lines(tasks, Stage::kEnter, i, p.vector_side());
      });
      workers.run(tasks, execute);
      tasks.clear();
      for_wave(s, [&](Power& p, size_t i) {
        p.state_norm = p.entered_norm = p.norm_of(p.vector_side().parts());
        p.entered = state(p);
        if (p.ordinary()) return;
        p.entered = p.vector;
        p.entered_norm = 1.0;
        add_lines(tasks, Stage::kNormalise, i, p.vector_side());
      });
      workers.run(tasks, execute);
    }
  }

 private:
  bool moves() const { return step_.new_state != nullptr; }
  float* back(const Power& p) const { return step_.new_state + p.op.row.state_offset; }

  // Calls body for every operator of a wave.
  template <class Body>
  void for_wave(size_t wave, Body&& body) {
    waves_.each(wave, [&](size_t i) { body(powers_[i], i); });
  }

  void add_products(std::vector<Task>& tasks, size_t stage, int64_t wanted) {
    int64_t work = 0;
    const auto count = [&](Power& p, size_t) { work += p.op.multiply_adds(); };
    for_wave(stage - 1, count);
    if (moves()) for_wave(stage - 2, count);
    const int64_t target = std::max<int64_t>(kGrain, work / wanted);
    const auto add = [&](Stage product, size_t i, bool image) {
      const Convolution& op = powers_[i].op;
      for (const Block& b :
           image ? image_blocks(op, kernels_, target) : adjoint_blocks(op, kernels_, target)) {
        tasks.push_back({product, i, b});
      }
    };
    if (moves())
      for_wave(stage - 2, [&](Power& p, size_t i) { add(Stage::kSecond, i, !p.forward()); });
    for_wave(stage - 1, [&](Power& p, size_t i) { add(Stage::kFirst, i, p.forward()); });
  }
  void add_lines(std::vector<Task>& tasks, Stage stage, size_t i, const Side& side) {
    const int64_t lines = side.lines_of_part();
    for (int64_t at = 0; at < side.lines; at += lines) {
      tasks.push_back({stage, i, {0, 0, at, std::min(side.lines, at + lines), 0, 0}});
    }
  }

  void perform(const Task& task, float* space) {
    Power& p = powers_[task.power];
    const Block& b = task.block;
    switch (task.stage) {
      case Stage::kEnter:
        pack(p, p.forward(), state(p), b);
        p.squares[static_cast<size_t>(b.first / p.vector_side().lines_of_part())] =
            kernels_.sum_of_squares(state(p) + b.first * p.vector_side().length,
                                    (b.last - b.first) * p.vector_side().length);
        return;
      case Stage::kNormalise:
        scale(state(p), reciprocal(p.state_norm), p.vector_side(), b, p.vector);
        return pack(p, p.forward(), p.vector, b);
      case Stage::kFirst:
        return product(p, p.forward(), p.entered, p.image, b, space);
      case Stage::kTurn:
        scale(p.image, reciprocal(p.image_norm), p.image_side(), b, p.image);
        if (moves()) pack(p, !p.forward(), p.image, b);
        return;
      case Stage::kSecond:
        return product(p, !p.forward(), p.image, back(p), b, space);
      case Stage::kKeep:
        return scale(state(p), reciprocal(p.state_norm), p.vector_side(), b, p.vector);
      case Stage::kLeave:
        return leave(p, b);
    }
  }

  const float* state(const Power& p) const { return step_.state + p.op.row.state_offset; }
  float sigma_before(const Power& p) const {
    return static_cast<float>(p.image_norm * reciprocal(p.entered_norm));
  }

  void scale(const float* x, double factor, const Side& side, const Block& b, float* y) {
    kernels_.multiply(x + b.first * side.length, factor, y + b.first * side.length,
                      (b.last - b.first) * side.length);
  }

  void pack(Power& p, bool forward, const float* x, const Block& b) {
    if (!forward) {
      kernels_.fill_panels(p.op, x, p.panels, b.first, b.last);
    } else if (!in_place(p.op)) {
      kernels_.fill_planes(p.op, x, true, p.planes, b.first, b.last);
    }
  }

  void product(Power& p, bool forward, const float* x, float* y, const Block& b, float* space) {
    if (forward) {
      kernels_.image(p.op, in_place(p.op) ? x : p.planes, x, y, p.squares.data(), b, space);
    } else {
      kernels_.adjoint(p.op, p.panels, x, y, p.squares.data(), b, space);
    }
  }

  // The next iterate, also as saved: A^T u normalised; where that is zero, v stays, and where it is
  // not finite, so does the iterate.
  void leave(Power& p, const Block& b) {
    const Side side = p.vector_side();
    const int64_t at = b.first * side.length, n = (b.last - b.first) * side.length;
    if (p.back_norm == 0.0) {
      scale(state(p), reciprocal(p.state_norm), side, b, p.vector);
    } else {
      scale(back(p), reciprocal(p.back_norm), side, b, p.vector);
    }
    std::memcpy(back(p) + at, std::isfinite(p.back_norm) ? p.vector + at : state(p) + at,
                static_cast<size_t>(n) * sizeof(float));
  }

  const SpectralStep& step_;
  const ConvolutionKernels& kernels_;
  std::vector<Power> powers_;
  Waves waves_;
};

}  // namespace

void operator_step(const SpectralStep& step) { Step(step, convolution_kernels(best_isa())).run(); }

}  // namespace lmtfast::cpu
