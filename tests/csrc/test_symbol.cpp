// SPDX-License-Identifier: MIT
// The symbol engine's kernels on small integers, where every instruction set must be exact, and its
// step and gradient through the C ABI: what they write, where, and on how many threads.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <random>

#include "check.h"
#include "ops/cpu/outer_product.h"
#include "ops/cpu/panel.h"
#include "ops/cpu/weight_pass.h"
#include "ops/spectral.h"

namespace {

using namespace lmtfast;
using namespace lmtfast::cpu;
using Floats = std::vector<float>;

Floats integers(int64_t n, int reach, unsigned seed) {
  std::mt19937 draw(seed);
  Floats x(static_cast<size_t>(n));
  for (float& v : x) v = static_cast<float>(static_cast<int>(draw() % (2 * reach + 1)) - reach);
  return x;
}

std::vector<uint16_t> bfloat16(const Floats& x) {
  std::vector<uint16_t> bits;
  for (const float v : x) bits.push_back(std::bit_cast<uint32_t>(v) >> 16);
  return bits;
}

float at(const Floats& panel, int64_t n, int64_t k) {
  return panel[n / kBlock * kPanelBlock + k * kBlock + n % kBlock];
}

void check_pass(Isa isa, int64_t rows, int64_t blocks, int64_t stride, bool next) {
  const int64_t n = blocks * kBlock;
  const Floats weights = integers(2 * rows * stride, 9, 1),
               panel = integers(n * kPanelColumns, 5, 2);
  const Floats coefficients = integers(rows * kPanelColumns, 7, 3);
  const std::vector<uint16_t> halves = bfloat16(weights);
  for (const int64_t dtype : {LMTFAST_FLOAT32, LMTFAST_BFLOAT16}) {
    const bool half = dtype == LMTFAST_BFLOAT16;
    const auto from = [&](int64_t i) {
      return half ? static_cast<const void*>(halves.data() + i) : weights.data() + i;
    };
    WeightRows block{from(0), stride, rows, blocks};
    if (next) block.next = from(rows * stride);
    Floats images = integers(rows * kPanelColumns, 3, 4), sums = integers(n * kPanelColumns, 3, 5);
    const Floats images_before = images, sums_before = sums;
    Floats fresh(sums.size(), std::numeric_limits<float>::quiet_NaN());
    weight_pass(dtype, isa).multiply(block, panel.data(), images.data());
    weight_pass(dtype, isa).multiply_adjoint(block, coefficients.data(), false, sums.data());
    weight_pass(dtype, isa).multiply_adjoint(block, coefficients.data(), true, fresh.data());
    bool exact = true;
    for (int64_t k = 0; k < kPanelColumns; ++k) {
      for (int64_t r = 0; r < rows; ++r) {
        double want = images_before[r * kPanelColumns + k];
        for (int64_t i = 0; i < n; ++i) want += weights[r * stride + i] * at(panel, i, k);
        exact = exact && images[r * kPanelColumns + k] == want;
      }
      for (int64_t i = 0; i < n; ++i) {
        double want = 0.0;
        for (int64_t r = 0; r < rows; ++r) {
          want += weights[r * stride + i] * coefficients[r * kPanelColumns + k];
        }
        exact = exact && at(fresh, i, k) == want;
        exact = exact && at(sums, i, k) == want + at(sums_before, i, k);
      }
    }
    CHECK(exact);
  }
}

void check_panels(Isa isa, int64_t blocks, int64_t period) {
  const PanelKernels& kernels = panel_kernels(isa);
  const int64_t n = blocks * kBlock;
  const Floats a = integers(n * kPanelColumns, 5, 6), z = integers(n * kPanelColumns, 5, 7);
  const Floats e = integers(period * kPanelBlock, 5, 8), factors = {1, -2, 3, 0.5f};
  Floats sum(a.size(), std::numeric_limits<float>::quiet_NaN()), turned = a, back = a;
  Floats products(period * kPanelBlock);
  kernels.add(a.data(), blocks, factors.data(), true, sum.data());
  kernels.add(z.data(), blocks, factors.data(), false, sum.data());
  kernels.rotate(e.data(), period, false, blocks, turned.data());
  kernels.rotate(e.data(), period, true, blocks, back.data());
  kernels.correlate(a.data(), z.data(), blocks, period, products.data());
  Floats want(products.size(), 0.0f);
  bool exact = true;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = i % (period * kBlock);
    for (int k = 0; k < kPanelColumns; k += 2) {
      const float ar = at(a, i, k), ai = at(a, i, k + 1), zr = at(z, i, k), zi = at(z, i, k + 1);
      const float er = at(e, j, k), ei = at(e, j, k + 1), factor = factors[k / 2];
      exact = exact && at(sum, i, k) == factor * (ar + zr);
      exact = exact && at(turned, i, k) == ar * er - ai * ei;
      exact = exact && at(turned, i, k + 1) == ai * er + ar * ei;
      exact = exact && at(back, i, k) == ar * er + ai * ei;
      exact = exact && at(back, i, k + 1) == ai * er - ar * ei;
      float* product = want.data() + j / kBlock * kPanelBlock + k * kBlock + j % kBlock;
      product[0] += ar * zr + ai * zi;
      product[kBlock] += ar * zi - ai * zr;
    }
  }
  CHECK(exact);
  CHECK(products == want);
}

void check_outer(Isa isa) {
  const OuterKernels& kernels = outer_kernels(isa);
  const Floats x = integers(100, 9, 9), y = integers(100, 9, 10);
  bool exact = true;
  for (int64_t n = 0; n < 70; ++n) {
    for (int64_t offset = 0; offset < 17; ++offset) {
      Floats stored(120, 7.0f), added = stored, streamed = stored, want = stored, sum = stored;
      for (int64_t i = 0; i < n; ++i) {
        want[offset + i] = 3 * x[i] - 2 * y[i];
        sum[offset + i] = 7 + 3 * x[i] - 2 * y[i];
      }
      kernels.store(3, x.data(), -2, y.data(), n, stored.data() + offset);
      kernels.add(3, x.data(), -2, y.data(), n, added.data() + offset);
      kernels.stream(3, x.data(), -2, y.data(), n, streamed.data() + offset);
      end_streaming();
      exact = exact && stored == want && added == sum && streamed == want;
    }
  }
  CHECK(exact);
}

// Two operators and their buffers, each between guards.
constexpr float kGuard = 12345.0f;
constexpr int64_t kGuards = 64;

Floats guarded(int64_t n) { return Floats(static_cast<size_t>(n + 2 * kGuards), kGuard); }

bool intact(const Floats& x) {
  const auto guard = [](float v) { return v == kGuard; };
  return std::all_of(x.begin(), x.begin() + kGuards, guard) &&
         std::all_of(x.end() - kGuards, x.end(), guard);
}

lmtfast_op_row conv(int64_t groups, int64_t rows, int64_t channels, int64_t kernel,
                    int64_t stride) {
  lmtfast_op_row row{};
  row.kind = 1;
  row.engine = LMTFAST_SYMBOL;
  row.row_scale = row.column_scale = -1;
  row.axes = 2;
  row.groups = groups;
  row.rows = rows;
  row.channels = channels;
  for (int axis = 0; axis < LMTFAST_OP_ROW_AXES; ++axis) {
    const bool used = axis > 0;
    row.kernel[axis] = used ? kernel : 1;
    row.stride[axis] = used ? stride : 1;
    row.dilation[axis] = 1;
    row.in[axis] = used ? 7 : 1;
    row.pad_low[axis] = row.pad_high[axis] = used ? kernel / 2 : 0;
    row.out[axis] =
        (row.in[axis] + 2 * row.pad_low[axis] - row.kernel[axis]) / row.stride[axis] + 1;
  }
  row.rank = std::min({static_cast<int64_t>(LMTFAST_RANK), channels, volume(row.in)});
  return row;
}

struct Problem {
  std::vector<lmtfast_op_row> rows{conv(1, 70, 31, 3, 1), conv(3, 2, 1, 5, 2), conv(1, 1, 1, 1, 1)};
  std::vector<Floats> weights, grads;
  std::vector<lmtfast_tensor> tensors, outputs;
  lmtfast_network network{};

  Problem() {
    for (lmtfast_op_row& row : rows) {
      const int64_t size = row.groups * row.rows * columns(row);
      row.weight_slot = static_cast<int64_t>(weights.size());
      row.state_offset = network.state_size;
      row.saved_offset = network.saved_size;
      network.state_size += state_entries(row);
      network.saved_size += saved_entries(row);
      weights.push_back(integers(size, 9, static_cast<unsigned>(size)));
      grads.push_back(guarded(size));
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      const auto size = static_cast<int64_t>(weights[i].size());
      tensors.push_back({weights[i].data(), LMTFAST_FLOAT32, size, 0});
      outputs.push_back({grads[i].data() + kGuards, LMTFAST_FLOAT32, size, 0});
    }
    network.rows = rows.data();
    network.n_rows = static_cast<int64_t>(rows.size());
  }
};

void check_abi() {
  std::vector<Floats> first;
  for (const int64_t threads : {1, 2, 7}) {
    Problem p;
    const int64_t n = p.network.n_rows;
    const Floats state = integers(p.network.state_size, 50, 11), grad_sigmas(n, 1.0f);
    Floats fresh = guarded(p.network.state_size), saved = guarded(p.network.saved_size);
    Floats sigmas = guarded(n), before = guarded(n), saved_before = guarded(p.network.saved_size);
    CHECK(lmtfast_spectral_step(&p.network, p.tensors.data(), n, state.data(), nullptr,
                                before.data() + kGuards, saved_before.data() + kGuards,
                                threads) == LMTFAST_OK);
    CHECK(lmtfast_spectral_step(&p.network, p.tensors.data(), n, state.data(),
                                fresh.data() + kGuards, sigmas.data() + kGuards,
                                saved.data() + kGuards, threads) == LMTFAST_OK);
    CHECK(lmtfast_spectral_vjp(&p.network, p.tensors.data(), n, saved.data() + kGuards,
                               grad_sigmas.data(), p.outputs.data(), threads) == LMTFAST_OK);
    CHECK(before == sigmas);
    CHECK(saved_before == saved);
    std::vector<Floats> all{fresh, saved, sigmas};
    all.insert(all.end(), p.grads.begin(), p.grads.end());
    for (const Floats& x : all) {
      CHECK(intact(x));
      CHECK(std::find(x.begin() + kGuards, x.end() - kGuards, kGuard) == x.end() - kGuards);
    }
    if (first.empty()) first = all;
    CHECK(first == all);
    // A single weight is its own norm, and its gradient the sign.
    CHECK_NEAR(sigmas[kGuards + 2], std::fabs(p.weights[2][0]), 1e-5);
    CHECK_NEAR(p.grads[2][kGuards], p.weights[2][0] < 0 ? -1.0 : 1.0, 1e-6);
  }
}

// A matrix of several tiles, whose first rows are zero: its sums are those of power iteration, and
// tiny weights give the same ones.
void check_tiles() {
  const int64_t channels = 32801, n_rows = 130, zero_rows = 70;
  lmtfast_op_row row = conv(1, n_rows, channels, 1, 1);
  lmtfast_network network{};
  network.rows = &row;
  network.n_rows = 1;
  network.state_size = state_entries(row);
  network.saved_size = saved_entries(row);
  Floats weights = integers(n_rows * channels, 9, 12);
  std::fill(weights.begin(), weights.begin() + zero_rows * channels, 0.0f);
  const Floats state = integers(network.state_size, 50, 13);
  Floats results[2], sigmas[2], saved(network.saved_size);
  for (int tiny = 0; tiny < 2; ++tiny) {
    Floats given = weights;
    for (float& w : given) w = std::ldexp(w, tiny ? -100 : 0);
    lmtfast_tensor tensor{given.data(), LMTFAST_FLOAT32, n_rows * channels, 0};
    results[tiny].resize(network.state_size);
    sigmas[tiny].resize(1);
    CHECK(lmtfast_spectral_step(&network, &tensor, 1, state.data(), results[tiny].data(),
                                sigmas[tiny].data(), saved.data(), 2) == LMTFAST_OK);
  }
  CHECK(results[0] == results[1]);
  CHECK(sigmas[0][0] == std::ldexp(sigmas[1][0], 100));
  // The first candidate's vector lies behind two points on the circle.
  std::vector<double> want(2 * channels, 0.0);
  for (int64_t r = zero_rows; r < n_rows; ++r) {
    double image[2] = {};
    for (int64_t i = 0; i < 2 * channels; ++i) {
      image[i % 2] += static_cast<double>(weights[r * channels + i / 2]) * state[4 + i];
    }
    for (int64_t i = 0; i < 2 * channels; ++i) {
      want[i] += image[i % 2] * static_cast<double>(weights[r * channels + i / 2]);
    }
  }
  double length = 0.0, error = 0.0;
  for (const double v : want) length += v * v;
  length = std::sqrt(length);
  for (int64_t i = 0; i < 2 * channels; ++i) {
    error += std::pow(want[i] / length - static_cast<double>(results[0][4 + i]), 2);
  }
  CHECK(length > 0.0);
  CHECK_NEAR(std::sqrt(error), 0.0, 1e-6);
}

void check_refusals() {
  Problem p;
  p.rows[0].identity = 1.0;
  p.rows[0].pad_low[1] = 3;
  Floats state(p.network.state_size, 1.0f), saved = guarded(p.network.saved_size - 2 * kGuards);
  Floats sigmas(p.network.n_rows, kGuard);
  CHECK(lmtfast_spectral_step(&p.network, p.tensors.data(), p.network.n_rows, state.data(), nullptr,
                              sigmas.data(), saved.data(), 1) == LMTFAST_INVALID_ARGUMENT);
  CHECK(std::strstr(lmtfast_last_error(), "rows.pad_low[0]") != nullptr);
  CHECK(std::count(saved.begin(), saved.end(), kGuard) == p.network.saved_size);
  // Sizes whose products are harmless, or would overflow.
  const lmtfast_op_row row = conv(1, 3, 4, 5, 5);
  lmtfast_op_row wrong[4] = {row, row, row, row};
  wrong[0].in[1] = wrong[0].in[2] = -5;
  wrong[1].pad_low[1] = int64_t{1} << 62;
  wrong[2].groups = wrong[2].rows = wrong[2].channels = int64_t{1} << 30;
  wrong[3].stride[0] = wrong[3].stride[1] = wrong[3].stride[2] = int64_t{1} << 30;
  for (const lmtfast_op_row& given : wrong) {
    p.network.rows = &given;
    p.network.n_rows = 1;
    CHECK(lmtfast_spectral_step(&p.network, p.tensors.data(), 1, state.data(), nullptr,
                                sigmas.data(), saved.data(), 1) == LMTFAST_INVALID_ARGUMENT);
    CHECK(std::strstr(lmtfast_last_error(), "rows") != nullptr);
  }
  // A scale that is an operator's weight.
  Problem q;
  const lmtfast_scale_row scale{0, 1, 2, -1, 0, 0.0, 1.0};
  q.network.scales = &scale;
  q.network.n_scales = q.network.scale_size = 1;
  for (lmtfast_op_row& own : q.rows) ++own.saved_offset;
  ++q.network.saved_size;
  Floats kept = guarded(q.network.saved_size);
  const auto call = [&] {
    return lmtfast_spectral_step(&q.network, q.tensors.data(), q.network.n_rows, state.data(),
                                 nullptr, sigmas.data(), kept.data() + kGuards, 1);
  };
  CHECK(call() == LMTFAST_INVALID_ARGUMENT);
  CHECK(std::strstr(lmtfast_last_error(), "scales.slot[0]") != nullptr);
  q.network.n_scales = 0;
  CHECK(call() == LMTFAST_OK);
}

}  // namespace

int main() {
  for (const Isa isa : kAllIsas) {
    if (!isa_supported(isa)) continue;
    for (const int64_t rows : {1, 2, 3, 5, 11, kRowBlock}) {
      for (const int64_t blocks : {0, 1, 2, 7, 33}) {
        for (const int64_t extra : {0, 5}) {
          check_pass(isa, rows, blocks, blocks * kBlock + extra, extra > 0);
        }
      }
    }
    for (const int64_t period : {1, 3, 9}) check_panels(isa, 10, period);
    check_outer(isa);
  }
  check_abi();
  check_tiles();
  check_refusals();
  return check::report();
}
