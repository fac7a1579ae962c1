// SPDX-License-Identifier: MIT
// Gradient of the `operator` engine: dW = row scale * column scale * (u v^T seen through the
// stencil), and its sums against W for the scales. Operators that share a weight follow one another.
#include <algorithm>

#include "ops/cpu/task_list.h"
#include "ops/cpu/waves.h"

namespace lmtfast::cpu {
namespace {

// An operator's gradient during a call.
struct Outer {
  Convolution op;
  int64_t index;
  float factor;     // the gradient in sigma
  float* gradient;  // of the weight; may be null
  bool accumulate, sums;
  const float *inputs, *outputs;  // the saved vectors on the two sides of the stencil
  std::vector<Block> blocks;
  // Per block of columns or of rows; empty without sums.
  std::vector<double> row_sums, column_sums;
  float* planes = nullptr;
  float* tiles = nullptr;

  int64_t rows() const { return op.row.groups * op.row.rows; }
  int64_t width() const { return op.row.groups * columns(op.row); }
};

enum class Stage { kPlanes, kTiles, kGradient };

struct Task {
  Stage stage;
  Outer* outer;
  Block block;
};

class Vjp {
 public:
  Vjp(const SpectralVjp& vjp, const ConvolutionKernels& kernels) : vjp_(vjp), kernels_(kernels) {
    std::vector<int64_t> seen(static_cast<size_t>(highest_slot()) + 1, 0);
    std::vector<std::vector<int64_t>> levels;
    for (const int64_t i : vjp.which) {
      const lmtfast_op_row& row = vjp.network.rows[i];
      const bool scaled = row.row_scale >= 0 || row.column_scale >= 0;
      if (gradient_of(row) == nullptr && !(vjp.grad_scales && scaled)) continue;
      const size_t level = static_cast<size_t>(seen[static_cast<size_t>(row.weight_slot)]++);
      if (levels.size() <= level) levels.emplace_back();
      levels[level].push_back(i);
    }
    for (const std::vector<int64_t>& level : levels) {
      for (const int64_t i : level) {
        add(i);
        const Convolution& op = outers_.back().op;
        waves_.add(op, tile_floats(op, kernels_), i == level.front());
      }
    }
  }

  void run() {
    int64_t work = 0, memory = 0;
    for (const Outer& o : outers_) {
      work += o.op.multiply_adds();
      memory = std::max(memory, workspace_floats(o.op, kernels_));
    }
    Workers workers(choose_threads(vjp_.threads, work, kGrain), memory);
    const size_t waves = waves_.count();
    for (size_t s = 0; s <= waves; ++s) {
      // Wave s is packed while wave s - 1 multiplies.
      std::vector<Task> tasks;
      for_wave(s - 1, [&](Outer& o) {
        for (const Block& b : o.blocks) tasks.push_back({Stage::kGradient, &o, b});
      });
      waves_.place(s, [&](size_t i, float* planes, float* tiles) {
        Outer& o = outers_[i];
        o.planes = planes;
        o.tiles = tiles;
        add_lines(tasks, Stage::kPlanes, o, o.op.row.groups * o.op.row.channels, o.op.inputs());
        add_lines(tasks, Stage::kTiles, o, row_tiles(o.op, kernels_),
                  o.op.outputs() * kernels_.tile_rows);
      });
      workers.run(tasks, [this](const Task& task, float* space) { perform(task, space); });
      for_wave(s - 1, [&](Outer& o) { reduce(o); });
    }
  }

 private:
  float* gradient_of(const lmtfast_op_row& row) const {
    return static_cast<float*>(vjp_.grads[row.weight_slot].data);
  }
  int64_t highest_slot() const {
    int64_t slot = 0;
    for (const int64_t i : vjp_.which) slot = std::max(slot, vjp_.network.rows[i].weight_slot);
    return slot;
  }

  void add(int64_t i) {
    const lmtfast_op_row& row = vjp_.network.rows[i];
    Outer o{Convolution(row, vjp_.tensors[row.weight_slot], vjp_.saved),
            i,
            vjp_.grad_sigmas[i],
            gradient_of(row),
            vjp_.accumulate[static_cast<size_t>(i)] != 0,
            vjp_.grad_scales && (row.row_scale >= 0 || row.column_scale >= 0),
            nullptr,
            nullptr,
            {},
            {},
            {}};
    const float* first = vjp_.saved + row.saved_offset;
    o.inputs = row.transposed ? first : first + o.op.output_entries();
    o.outputs = row.transposed ? first + o.op.input_entries() : first;
    o.blocks = gradient_blocks(o.op, kernels_);
    if (o.sums) {
      const Block& last = o.blocks.back();
      o.row_sums.resize(static_cast<size_t>((column_block(last) + 1) * o.rows()));
      o.column_sums.resize(static_cast<size_t>((last.part + 1) * o.width()));
    }
    outers_.push_back(std::move(o));
  }
  static int64_t column_block(const Block& b) { return b.begin / kGradientColumns; }

  template <class Body>
  void for_wave(size_t wave, Body&& body) {
    waves_.each(wave, [&](size_t i) { body(outers_[i]); });
  }

  void add_lines(std::vector<Task>& tasks, Stage stage, Outer& o, int64_t lines, int64_t length) {
    const int64_t step = std::max<int64_t>(1, kChunk / length);
    for (int64_t at = 0; at < lines; at += step) {
      tasks.push_back({stage, &o, {0, 0, at, std::min(lines, at + step), 0, 0}});
    }
  }

  void perform(const Task& task, float* space) {
    Outer& o = *task.outer;
    const Block& b = task.block;
    switch (task.stage) {
      case Stage::kPlanes:
        if (in_place(o.op)) return;
        return kernels_.fill_planes(o.op, o.inputs, !o.sums, o.planes, b.first, b.last);
      case Stage::kTiles:
        return kernels_.fill_tiles(o.op, o.outputs, o.factor, !o.sums, o.tiles, b.first, b.last);
      case Stage::kGradient: {
        GradientTarget target{o.gradient, o.accumulate, nullptr, nullptr};
        if (o.sums) {
          target.row_sums = o.row_sums.data() + column_block(b) * o.rows();
          target.column_sums = o.column_sums.data() + b.part * o.width();
        }
        return kernels_.gradient(o.op, in_place(o.op) ? o.inputs : o.planes, o.tiles, target, b,
                                 space);
      }
    }
  }

  // Sums of all blocks into the gradient of the scales, in order.
  void reduce(const Outer& o) {
    if (!o.sums) return;
    const lmtfast_op_row& row = o.op.row;
    const size_t rows = static_cast<size_t>(o.rows());
    for (size_t i = 0; row.row_scale >= 0 && i < o.row_sums.size(); ++i) {
      vjp_.grad_scales[row.row_scale + static_cast<int64_t>(i % rows)] += o.row_sums[i];
    }
    const int64_t width = columns(row), width_of_all = o.width();
    for (size_t i = 0; row.column_scale >= 0 && i < o.column_sums.size(); ++i) {
      const int64_t k = static_cast<int64_t>(i) % width_of_all;
      const int64_t c = o.op.tap_major ? k % width % row.channels : k % width / taps(row);
      vjp_.grad_scales[row.column_scale + k / width * row.channels + c] += o.column_sums[i];
    }
  }

  const SpectralVjp& vjp_;
  const ConvolutionKernels& kernels_;
  std::vector<Outer> outers_;
  Waves waves_;
};

}  // namespace

void operator_vjp(const SpectralVjp& vjp) { Vjp(vjp, convolution_kernels(best_isa())).run(); }

}  // namespace lmtfast::cpu
