// SPDX-License-Identifier: MIT
// The symbol engine's gradient on the CPU: dW = row scale * column scale * (u_re z_re + u_im z_im)
// in the winner's group. Nothing reads the weights but the gradient of column scales.
#include <algorithm>
#include <cmath>
#include <map>

#include "core/buffer.h"
#include "core/parallel.h"
#include "ops/cpu/outer_product.h"
#include "ops/cpu/symbol.h"

namespace lmtfast::cpu {
namespace {

// Weights of a task.
constexpr int64_t kTask = 1 << 17;
constexpr int64_t kWeightsPerThread = 1 << 14;
// Gradients of more entries than this go past the caches, which they would empty.
constexpr int64_t kStreamed = 1 << 21;

// An operator, what its step saved, and its share of the gradient.
struct Term {
  const SymbolOperator& op;
  SymbolSavedAt<const float> saved;
  double grad;
  int64_t group;
  bool accumulate;
  // diag(column scale) z in the order of the weights
  std::vector<float> re, im;

  Term(const SymbolOperator& op, const SpectralVjp& call)
      : op(op),
        saved(*op.row, call.saved),
        grad(call.grad_sigmas[op.index]),
        // What is not a number is no group: the first one then shows it in its vectors.
        group(*saved.group >= 0 && *saved.group < static_cast<float>(op.row->groups)
                  ? static_cast<int64_t>(*saved.group)
                  : 0),
        accumulate(call.accumulate[op.index] != 0),
        re(static_cast<size_t>(op.columns)),
        im(static_cast<size_t>(op.columns)) {
    const int64_t n_taps = op.spectrum.taps();
    for (int64_t c = 0; c < op.row->channels; ++c) {
      const float scale = op.column_scale ? op.column_scale[group * op.row->channels + c] : 1.0f;
      for (int64_t t = 0; t < n_taps; ++t) {
        re[op.at(c, t)] = scale * saved.z[2 * (c * n_taps + t)];
        im[op.at(c, t)] = scale * saved.z[2 * (c * n_taps + t) + 1];
      }
    }
  }

  double row_scale(int64_t r) const {
    return op.row_scale ? op.row_scale[group * op.row->rows + r] : 1.0;
  }

  // Writes, or adds, entries [begin, end) of one row of the gradient.
  void write_row(int64_t row, int64_t begin, int64_t end, bool stream, float* out) const {
    const int64_t r = row - group * op.row->rows;
    if (r < 0 || r >= op.row->rows) {
      if (!accumulate) std::fill(out, out + (end - begin), 0.0f);
      return;
    }
    const double scale = grad * row_scale(r);
    const float a = static_cast<float>(scale * saved.u[2 * r]);
    const float b = static_cast<float>(scale * saved.u[2 * r + 1]);
    const OuterKernels& kernels = outer_kernels(best_isa());
    const OuterRow kernel = accumulate ? kernels.add : stream ? kernels.stream : kernels.store;
    kernel(a, re.data() + begin, b, im.data() + begin, end - begin, out);
  }

  void write(int64_t begin, int64_t end, bool stream, float* out) const {
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / op.columns, stop = std::min(end, (row + 1) * op.columns);
      write_row(row, at - row * op.columns, stop - row * op.columns, stream, out + at);
      at = stop;
    }
  }

  void row_scale_grad(double* grads) const {
    double* out = grads + op.row->row_scale + group * op.row->rows;
    for (int64_t r = 0; r < op.row->rows; ++r) {
      out[r] += grad * (static_cast<double>(saved.u[2 * r]) * saved.p[2 * r] +
                        static_cast<double>(saved.u[2 * r + 1]) * saved.p[2 * r + 1]);
    }
  }

  // d column scale_c = grad * sum over taps of Re(conj(z) W^T (row scale u)).
  void column_scale_grad(double* grads) const;
};

void Term::column_scale_grad(double* grads) const {
  const WeightPass& kernels = weight_pass(op.weight->dtype, best_isa());
  const WeightPass& tail_kernels = weight_pass(LMTFAST_FLOAT32, best_isa());
  const int64_t rows = op.row->rows, whole = op.columns / kBlock, rest = op.columns % kBlock;
  double largest = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    const double size = std::max(std::fabs(saved.u[2 * r]), std::fabs(saved.u[2 * r + 1]));
    largest = std::max(largest, std::fabs(row_scale(r)) * size);
  }
  // Coefficients near one: the product with the weights then neither overflows nor vanishes.
  const int exponent = largest > 0 && std::isfinite(largest) ? std::ilogb(largest) : 0;
  Buffer<float> sums(op.blocks * kPanelBlock), line(2 * op.blocks * kBlock);
  alignas(64) float tail[kRowBlock * kBlock] = {}, coefficients[kRowBlock * kPanelColumns] = {};
  for (int64_t begin = 0; begin < rows; begin += kRowBlock) {
    const int64_t height = std::min<int64_t>(kRowBlock, rows - begin);
    const int64_t first = (group * rows + begin) * op.columns;
    for (int64_t r = 0; r < height; ++r) {
      const double scale = std::ldexp(row_scale(begin + r), -exponent);
      for (int part = 0; part < 2; ++part) {
        coefficients[r * kPanelColumns + part] =
            static_cast<float>(scale * saved.u[2 * (begin + r) + part]);
      }
      if (rest > 0) {
        op.copy_weights(first + r * op.columns + whole * kBlock, rest, tail + r * kBlock);
      }
    }
    kernels.multiply_adjoint({op.weight_at(first), op.columns, height, whole}, coefficients,
                             begin == 0, sums.data());
    tail_kernels.multiply_adjoint({tail, kBlock, height, rest > 0}, coefficients, begin == 0,
                                  sums.data() + whole * kPanelBlock);
  }
  const int64_t n_taps = op.spectrum.taps();
  float *ar = line.data(), *ai = line.data() + op.blocks * kBlock;
  read_column(sums.data(), op.blocks, 0, ar);
  read_column(sums.data(), op.blocks, 1, ai);
  double* out = grads + op.row->column_scale + group * op.row->channels;
  for (int64_t c = 0; c < op.row->channels; ++c) {
    double sum = 0.0;
    for (int64_t t = 0; t < n_taps; ++t) {
      const float* z = saved.z + 2 * (c * n_taps + t);
      sum +=
          static_cast<double>(z[0]) * ar[op.at(c, t)] + static_cast<double>(z[1]) * ai[op.at(c, t)];
    }
    out[c] += grad * std::ldexp(sum, exponent);
  }
}

// Entries [begin, end) of one tensor's gradient.
struct Task {
  int64_t slot, begin, end;
};

}  // namespace

void symbol_vjp(const SpectralVjp& call) {
  std::vector<SymbolOperator> ops;
  ops.reserve(call.which.size());
  for (const int64_t i : call.which) ops.emplace_back(call.network, call.tensors, call.saved, i);
  std::vector<Term> terms;
  terms.reserve(ops.size());
  for (const SymbolOperator& op : ops) terms.emplace_back(op, call);
  // Operators that share a tensor write it one after the other, in the order of the table.
  std::map<int64_t, std::vector<const Term*>> writers;
  for (const Term& term : terms) writers[term.op.row->weight_slot].push_back(&term);
  std::vector<Task> tasks;
  int64_t work = 0;
  for (const auto& [slot, users] : writers) {
    if (call.grads[slot].data == nullptr) continue;
    const int64_t size = call.grads[slot].size;
    for (int64_t at = 0; at < size; at += kTask)
      tasks.push_back({slot, at, std::min(size, at + kTask)});
    work += size;
  }
  const int64_t threads = choose_threads(call.threads, work, kWeightsPerThread);
  parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i) {
    const Task& task = tasks[i];
    float* out = static_cast<float*>(call.grads[task.slot].data);
    const auto& terms_of = writers.at(task.slot);
    // What another operator adds to must not have left the caches.
    const bool stream = work > kStreamed && terms_of.size() == 1;
    for (const Term* term : terms_of) term->write(task.begin, task.end, stream, out);
    if (stream) end_streaming();
  });
  if (call.grad_scales == nullptr) return;
  for (const Term& term : terms) {
    if (term.op.row_scale) term.row_scale_grad(call.grad_scales);
  }
  // Each operator has a stretch of the scale buffer of its own.
  parallel_for(static_cast<int64_t>(terms.size()), threads, [&](int64_t i) {
    if (terms[i].op.column_scale) terms[i].column_scale_grad(call.grad_scales);
  });
}

}  // namespace lmtfast::cpu
