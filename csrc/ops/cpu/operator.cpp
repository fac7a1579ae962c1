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

#include "ops/cpu/convolution.h"
#include "ops/cpu/task_list.h"

namespace lmtfast::cpu {
namespace {

// Weights and packed vectors of a wave.
constexpr int64_t kWaveBytes = int64_t{32} << 20;
constexpr int64_t kChunk = 1 << 14;
// Multiply-adds that pay for waking a thread, and tasks per thread of a stage.
constexpr int64_t kGrain = 1 << 21;
constexpr int64_t kTasksPerThread = 8;

// Vectors of one side of a stencil, as lines of equal length.
struct Side {
  int64_t lines, length;
  int64_t entries() const { return lines * length; }
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

int64_t chunks(int64_t entries) { return (entries + kChunk - 1) / kChunk; }

// An operator and its vectors during a call.
struct Power {
  Convolution op;
  int64_t index;
  float *image, *vector;  // u and v, as saved
  float* planes = nullptr;
  float* panels = nullptr;
  std::vector<double> squares;  // of one vector, per chunk
  double norm = 0.0;            // of the vector whose squares were summed last

  Power(const Convolution& o, int64_t i, float* saved) : op(o), index(i), image(saved) {
    vector = saved + image_side().entries();
    squares.resize(static_cast<size_t>(chunks(std::max(op.input_entries(), op.output_entries()))));
  }
  // A maps the vector side to the image side.
  Side vector_side() const { return op.row.transposed ? output_side(op) : input_side(op); }
  Side image_side() const { return op.row.transposed ? input_side(op) : output_side(op); }

  void sum_squares(const Side& side) {
    double sum = 0.0;
    for (int64_t i = 0; i < chunks(side.entries()); ++i) sum += squares[static_cast<size_t>(i)];
    norm = root(sum);
  }
};

enum class Stage { kSquares, kEnter, kFirst, kTurn, kSecond, kLeave };

struct Task {
  Stage stage;
  size_t power;
  const float* squared;  // kSquares: the vector
  Block block;           // of lines, [first, last); of entries for kSquares
};

class Step {
 public:
  Step(const SpectralStep& step, const ConvolutionKernels& kernels)
      : step_(step), kernels_(kernels) {
    for (const int64_t i : step.which) {
      const lmtfast_op_row& row = step.network.rows[i];
      const Convolution op(row, step.tensors[row.weight_slot], step.saved);
      powers_.emplace_back(op, i, step.saved + row.saved_offset);
    }
    plan_waves();
  }

  void run() {
    const size_t waves = waves_.size() - 1, stages = waves + (moves() ? 1 : 0);
    int64_t work = 0, memory = 0;
    for (const Power& p : powers_) {
      work += p.op.multiply_adds() * (moves() ? 2 : 1);
      memory = std::max(memory, workspace_floats(p.op, kernels_));
    }
    Workers workers(choose_threads(step_.threads, work, kGrain), memory);
    const int64_t tasks = workers.threads() * kTasksPerThread;
    for (size_t s = 0; s <= stages; ++s) {
      // Wave s enters, wave s - 1 multiplies by A, wave s - 2 by A^T.
      std::vector<Task> products, squares, rest;
      int64_t multiply_adds = 0;
      for_wave(s - 1, [&](Power& p, size_t) { multiply_adds += p.op.multiply_adds(); });
      if (moves())
        for_wave(s - 2, [&](Power& p, size_t) { multiply_adds += p.op.multiply_adds(); });
      const int64_t target = std::max<int64_t>(kGrain, multiply_adds / tasks);
      if (moves()) {
        for_wave(s - 2, [&](Power& p, size_t i) {
          add_product(products, Stage::kSecond, i, p.op.row.transposed != 0, target);
          add_squares(squares, i, p.vector_side(), back(p));
          add_lines(rest, Stage::kLeave, i, p.vector_side());
        });
      }
      for_wave(s - 1, [&](Power& p, size_t i) {
        add_product(products, Stage::kFirst, i, p.op.row.transposed == 0, target);
        add_squares(squares, i, p.image_side(), p.image);
        add_lines(rest, Stage::kTurn, i, p.image_side());
      });
      for_wave(s, [&](Power& p, size_t i) {
        add_squares(squares, i, p.vector_side(), step_.state + p.op.row.state_offset);
        add_lines(rest, Stage::kEnter, i, p.vector_side());
      });
      const auto execute = [this](const Task& task, float* memory) { perform(task, memory); };
      workers.run(products, execute);
      workers.run(squares, execute);
      if (moves()) for_wave(s - 2, [&](Power& p, size_t) { end(p, p.vector_side()); });
      for_wave(s - 1, [&](Power& p, size_t) {
        if (moves()) {
          p.sum_squares(p.image_side());
        } else {
          end(p, p.image_side());
        }
      });
      used_ = 0;
      for_wave(s, [&](Power& p, size_t) {
        p.sum_squares(p.vector_side());
        place(p, s % 2);
      });
      workers.run(rest, execute);
    }
  }

 private:
  bool moves() const { return step_.new_state != nullptr; }
  float* back(const Power& p) const { return step_.new_state + p.op.row.state_offset; }

  void end(Power& p, const Side& side) {
    p.sum_squares(side);
    step_.sigmas[p.index] = static_cast<float>(p.norm);
  }

  int64_t packed_floats(const Power& p) const {
    return plane_floats(p.op) + panel_floats(p.op, kernels_);
  }

  void plan_waves() {
    int64_t bytes = kWaveBytes, packed = 0, largest[2] = {0, 0};
    for (size_t i = 0; i < powers_.size(); ++i) {
      const int64_t floats = packed_floats(powers_[i]);
      const int64_t needed = 4 * (floats + powers_[i].op.weight_entries());
      if (bytes + needed > kWaveBytes) {
        waves_.push_back(i);
        bytes = packed = 0;
      }
      bytes += needed;
      packed += floats;
      int64_t& most = largest[(waves_.size() - 1) % 2];
      most = std::max(most, packed);
    }
    waves_.push_back(powers_.size());
    for (int parity : {0, 1}) {
      memory_[parity].reset(new float[static_cast<size_t>(largest[parity])]);
    }
  }

  // Calls body for every operator of a wave; there is none before the first or after the last.
  template <class Body>
  void for_wave(size_t wave, Body&& body) {
    if (wave >= waves_.size() - 1) return;
    for (size_t i = waves_[wave]; i < waves_[wave + 1]; ++i) body(powers_[i], i);
  }

  // Gives an operator its packed vectors, behind those of the wave's operators before it.
  void place(Power& p, size_t parity) {
    float* memory = memory_[parity].get() + used_;
    const int64_t planes = plane_floats(p.op), panels = panel_floats(p.op, kernels_);
    for (float* edge :
         {memory, memory + planes - kSlack, memory + planes, memory + planes + panels - kSlack}) {
      std::memset(edge, 0, kSlack * sizeof(float));
    }
    p.planes = memory + kSlack;
    p.panels = memory + planes + kSlack;
    used_ += planes + panels;
  }
  void add_product(std::vector<Task>& tasks, Stage stage, size_t i, bool forward, int64_t target) {
    const Convolution& op = powers_[i].op;
    for (const Block& b :
         forward ? image_blocks(op, kernels_, target) : adjoint_blocks(op, target)) {
      tasks.push_back({stage, i, nullptr, b});
    }
  }
  void add_squares(std::vector<Task>& tasks, size_t i, const Side& side, const float* x) {
    for (int64_t at = 0; at < side.entries(); at += kChunk) {
      tasks.push_back(
          {Stage::kSquares, i, x, {0, 0, at, std::min(side.entries(), at + kChunk), 0, 0}});
    }
  }
  void add_lines(std::vector<Task>& tasks, Stage stage, size_t i, const Side& side) {
    const int64_t lines = std::max<int64_t>(1, kChunk / side.length);
    for (int64_t at = 0; at < side.lines; at += lines) {
      tasks.push_back({stage, i, nullptr, {0, 0, at, std::min(side.lines, at + lines), 0, 0}});
    }
  }

  void perform(const Task& task, float* memory) {
    Power& p = powers_[task.power];
    const Block& b = task.block;
    switch (task.stage) {
      case Stage::kSquares:
        p.squares[static_cast<size_t>(b.first / kChunk)] =
            kernels_.sum_of_squares(task.squared + b.first, b.last - b.first);
        return;
      case Stage::kEnter:
        kernels_.multiply(step_.state + p.op.row.state_offset + b.first * p.vector_side().length,
                          reciprocal(p.norm), p.vector + b.first * p.vector_side().length,
                          (b.last - b.first) * p.vector_side().length);
        return pack(p, p.op.row.transposed == 0, p.vector, b);
      case Stage::kFirst:
        return product(p, p.op.row.transposed == 0, p.vector, p.image, b, memory);
      case Stage::kTurn:
        scale(p.image, reciprocal(p.norm), p.image_side(), b, p.image);
        return moves() ? pack(p, p.op.row.transposed != 0, p.image, b) : void();
      case Stage::kSecond:
        return product(p, p.op.row.transposed != 0, p.image, back(p), b, memory);
      case Stage::kLeave:
        return leave(p, b);
    }
  }

  void scale(const float* x, double factor, const Side& side, const Block& b, float* y) {
    kernels_.multiply(x + b.first * side.length, factor, y + b.first * side.length,
                      (b.last - b.first) * side.length);
  }

  void pack(Power& p, bool forward, const float* x, const Block& b) {
    if (forward) {
      kernels_.fill_planes(p.op, x, true, p.planes, b.first, b.last);
    } else {
      kernels_.fill_panels(p.op, x, p.panels, b.first, b.last);
    }
  }

  void product(Power& p, bool forward, const float* x, float* y, const Block& b, float* memory) {
    if (forward) {
      kernels_.image(p.op, p.planes, x, y, b, memory);
    } else {
      kernels_.adjoint(p.op, p.panels, x, y, b, memory);
    }
  }

  // The next iterate, also as saved: A^T u normalised; where that is zero, v stays, and where it is
  // not finite, so does the iterate.
  void leave(Power& p, const Block& b) {
    const Side side = p.vector_side();
    const int64_t at = b.first * side.length, n = (b.last - b.first) * side.length;
    float* next = back(p) + at;
    if (p.norm == 0.0) {
      std::memcpy(next, p.vector + at, static_cast<size_t>(n) * sizeof(float));
      return;
    }
    scale(back(p), reciprocal(p.norm), side, b, p.vector);
    std::memcpy(next,
                std::isfinite(p.norm) ? p.vector + at : step_.state + p.op.row.state_offset + at,
                static_cast<size_t>(n) * sizeof(float));
  }

  const SpectralStep& step_;
  const ConvolutionKernels& kernels_;
  std::vector<Power> powers_;
  std::vector<size_t> waves_;  // first operator of each, then their number
  std::unique_ptr<float[]> memory_[2];
  int64_t used_ = 0;
};

}  // namespace

void operator_step(const SpectralStep& step) { Step(step, convolution_kernels(best_isa())).run(); }

}  // namespace lmtfast::cpu
