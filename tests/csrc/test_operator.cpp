// SPDX-License-Identifier: MIT
// Products of random stencils with small integers against plain loops: every instruction set, every
// layout, all buffers fenced.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "fence.h"
#include "ops/cpu/convolution.h"

namespace {

using namespace lmtfast;
using namespace lmtfast::cpu;

std::mt19937 generator(7);
int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

lmtfast_op_row stencil(int axes, int64_t groups, int64_t rows, int64_t channels) {
  lmtfast_op_row row{};
  row.kind = 1;
  row.engine = LMTFAST_OPERATOR;
  row.row_scale = row.column_scale = -1;
  row.axes = axes;
  row.groups = groups;
  row.rows = rows;
  row.channels = channels;
  for (int a = 0; a < LMTFAST_OP_ROW_AXES; ++a) {
    row.in[a] = row.out[a] = row.kernel[a] = row.stride[a] = row.dilation[a] = 1;
  }
  return row;
}

void set_axis(lmtfast_op_row& row, int a, int64_t in, int64_t kernel, int64_t stride,
              int64_t dilation, int64_t low, int64_t high) {
  row.in[a] = in;
  row.kernel[a] = kernel;
  row.stride[a] = stride;
  row.dilation[a] = dilation;
  row.pad_low[a] = low;
  row.pad_high[a] = high;
  row.out[a] = (in + low + high - dilation * (kernel - 1) - 1) / stride + 1;
}

lmtfast_op_row random_stencil() {
  const int axes = static_cast<int>(pick(1, 3));
  const int64_t groups = pick(0, 3) == 0 ? pick(2, 4) : 1;
  lmtfast_op_row row = stencil(axes, groups, pick(1, 40 / groups), pick(1, 30 / groups));
  row.circular = pick(0, 3) == 0;
  if (pick(0, 2) == 0) row.identity = 2.0;
  for (int a = 3 - axes; a < 3; ++a) {
    const int64_t kernel = pick(1, 4), dilation = pick(1, 2), reach = dilation * (kernel - 1) + 1;
    const int64_t in = std::max(reach, pick(1, axes == 1 ? 60 : axes == 2 ? 20 : 7));
    const int64_t most = std::min<int64_t>(in, reach - 1);
    set_axis(row, a, in, kernel, pick(1, 3), dilation, pick(0, most), pick(0, most));
  }
  return row;
}

std::vector<float> integers(int64_t n) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& value : x) value = static_cast<float>(pick(-3, 3));
  return x;
}

// An operator with its tensor and scales, and the products by their definition.
class Case {
 public:
  Case(const lmtfast_op_row& r, bool bfloat16, bool tap_major, bool scaled) : row_(r) {
    weight_ = integers(row_.groups * row_.rows * columns(row_));
    halves_.resize(weight_.size());
    for (size_t i = 0; i < weight_.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &weight_[i], sizeof bits);
      halves_[i] = static_cast<uint16_t>(bits >> 16);  // small integers fit
    }
    if (scaled) {
      row_.row_scale = 0;
      row_.column_scale = row_.groups * row_.rows;
      scales_ = integers(row_.groups * (row_.rows + row_.channels));
      for (float& s : scales_) s = s == 0.0f ? 2.0f : s;
    }
    tensor_ = {bfloat16 ? static_cast<void*>(halves_.data()) : weight_.data(),
               bfloat16 ? LMTFAST_BFLOAT16 : LMTFAST_FLOAT32, static_cast<int64_t>(weight_.size()),
               tap_major};
  }

  const lmtfast_op_row& row() const { return row_; }
  const lmtfast_tensor& tensor() const { return tensor_; }
  const float* scales() const { return scales_.data(); }
  double weight(int64_t at) const { return weight_[static_cast<size_t>(at)]; }
  double row_scale(int64_t r) const { return scales_.empty() ? 1.0 : scales_[r]; }
  double column_scale(int64_t c) const {
    return scales_.empty() ? 1.0 : scales_[row_.groups * row_.rows + c];
  }

  // Calls body(output row, output, input channel, input, weight index) for every product.
  template <class Body>
  void for_products(Body&& body) const {
    const int64_t points = volume(row_.out), inputs = volume(row_.in), t_all = taps(row_);
    for (int64_t o = 0; o < points; ++o) {
      for (int64_t t = 0; t < t_all; ++t) {
        const int64_t i = input_of(o, t);
        if (i < 0) continue;
        for (int64_t g = 0; g < row_.groups; ++g) {
          for (int64_t r = g * row_.rows; r < (g + 1) * row_.rows; ++r) {
            for (int64_t c = 0; c < row_.channels; ++c) {
              const int64_t k = tensor_.tap_major ? t * row_.channels + c : c * t_all + t;
              body(r, r * points + o, g * row_.channels + c, (g * row_.channels + c) * inputs + i,
                   r * columns(row_) + k);
            }
          }
        }
      }
    }
  }
  // Calls body(output, input) for what the identity adds.
  template <class Body>
  void for_identity(Body&& body) const {
    if (row_.identity == 0.0) return;
    const int64_t points = volume(row_.out), inputs = volume(row_.in);
    for (int64_t g = 0; g < row_.groups; ++g) {
      for (int64_t c = 0; c < std::min(row_.rows, row_.channels); ++c) {
        for (int64_t o = 0; o < points; ++o) {
          const int64_t i = input_of(o, -1);
          if (i >= 0) {
            body((g * row_.rows + c) * points + o, (g * row_.channels + c) * inputs + i);
          }
        }
      }
    }
  }

 private:
  // The input that output o reads at tap t (-1: the centre), -1 in the padding.
  int64_t input_of(int64_t o, int64_t t) const {
    int64_t index = 0, o_rest = o, t_rest = t, factor = 1;
    for (int a = 2; a >= 0; --a) {
      const int64_t tap = t < 0 ? row_.pad_low[a] / row_.dilation[a] : t_rest % row_.kernel[a];
      int64_t i =
          row_.stride[a] * (o_rest % row_.out[a]) + row_.dilation[a] * tap - row_.pad_low[a];
      if (row_.circular) i = (i % row_.in[a] + row_.in[a]) % row_.in[a];
      if (i < 0 || i >= row_.in[a]) return -1;
      index += i * factor;
      factor *= row_.in[a];
      o_rest /= row_.out[a];
      t_rest /= row_.kernel[a];
    }
    return index;
  }

  lmtfast_op_row row_;
  std::vector<float> weight_, scales_;
  std::vector<uint16_t> halves_;
  lmtfast_tensor tensor_;
};

bool equal(const std::vector<float>& got, const std::vector<double>& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    if (static_cast<double>(got[i]) != want[i]) return false;  // NaN is unequal
  }
  return got.size() == want.size();
}

double sum(const Fenced<double>& parts) {
  double total = 0.0;
  for (size_t i = 0; i < parts.size(); ++i) total += parts[i];
  return total;
}

double squares(const std::vector<double>& x) {
  double total = 0.0;
  for (const double value : x) total += value * value;
  return total;
}

// A packed operand between fences; zero where the engine has it zero.
Fenced<float> operand(int64_t floats, bool at_end) {
  return Fenced<float>(static_cast<size_t>(std::max(floats, 2 * kSlack)), at_end);
}

void test_image(const Case& c, const Convolution& op, const ConvolutionKernels& kernels,
                int64_t target, bool at_end) {
  const Fenced<float> x(integers(op.input_entries()), at_end);
  const Fenced<float> u(static_cast<size_t>(op.output_entries()), at_end);
  const Fenced<float> planes = operand(plane_floats(op), at_end);
  const Fenced<float> space(static_cast<size_t>(workspace_floats(op, kernels)), at_end);
  const Fenced<double> parts(static_cast<size_t>(image_squares(op)), at_end);
  if (!in_place(op)) {
    kernels.fill_planes(op, x.data(), true, planes.data() + kSlack, 0,
                        op.row.groups * op.row.channels);
  }
  for (const Block& b : image_blocks(op, kernels, target)) {
    kernels.image(op, in_place(op) ? x.data() : planes.data() + kSlack, x.data(), u.data(),
                  parts.data(), b, space.data());
  }
  std::vector<double> want(u.size(), 0.0);
  c.for_products([&](int64_t r, int64_t out, int64_t channel, int64_t in, int64_t w) {
    want[out] += c.row_scale(r) * c.column_scale(channel) * c.weight(w) * x[in];
  });
  c.for_identity([&](int64_t out, int64_t in) { want[out] += c.row().identity * x[in]; });
  CHECK(equal(u.values(), want));
  CHECK(u.tail_intact());
  CHECK(sum(parts) == squares(want));
}

void test_adjoint(const Case& c, const Convolution& op, const ConvolutionKernels& kernels,
                  int64_t target, bool at_end) {
  const Fenced<float> u(integers(op.output_entries()), at_end);
  const Fenced<float> x(static_cast<size_t>(op.input_entries()), at_end);
  const Fenced<float> panels = operand(panel_floats(op, kernels), at_end);
  const Fenced<float> space(static_cast<size_t>(workspace_floats(op, kernels)), at_end);
  const Fenced<double> parts(static_cast<size_t>(adjoint_squares(op)), at_end);
  kernels.fill_panels(op, u.data(), panels.data() + kSlack, 0, op.row.groups * op.row.rows);
  for (const Block& b : adjoint_blocks(op, kernels, target)) {
    kernels.adjoint(op, panels.data() + kSlack, u.data(), x.data(), parts.data(), b, space.data());
  }
  std::vector<double> want(x.size(), 0.0);
  c.for_products([&](int64_t r, int64_t out, int64_t channel, int64_t in, int64_t w) {
    want[in] += c.row_scale(r) * c.column_scale(channel) * c.weight(w) * u[out];
  });
  c.for_identity([&](int64_t out, int64_t in) { want[in] += c.row().identity * u[out]; });
  CHECK(equal(x.values(), want));
  CHECK(x.tail_intact());
  CHECK(sum(parts) == squares(want));
}

void test_gradient(const Case& c, const Convolution& op, const ConvolutionKernels& kernels,
                   bool with_sums, bool accumulate, bool at_end) {
  const Fenced<float> x(integers(op.input_entries()), at_end);
  const Fenced<float> u(integers(op.output_entries()), at_end);
  const std::vector<float> before = integers(op.weight_entries());
  const Fenced<float> gradient(before, at_end);
  const Fenced<float> planes = operand(plane_floats(op), at_end);
  const Fenced<float> tiles = operand(tile_floats(op, kernels), at_end);
  const Fenced<float> space(static_cast<size_t>(workspace_floats(op, kernels)), at_end);
  if (!in_place(op)) {
    kernels.fill_planes(op, x.data(), !with_sums, planes.data() + kSlack, 0,
                        op.row.groups * op.row.channels);
  }
  kernels.fill_tiles(op, u.data(), 2.0f, !with_sums, tiles.data() + kSlack, 0,
                     row_tiles(op, kernels));
  const std::vector<Block> blocks = gradient_blocks(op, kernels);
  const int64_t rows = op.row.groups * op.row.rows, width = columns(op.row);
  const int64_t column_blocks = blocks.back().begin / kGradientColumns + 1;
  const int64_t row_blocks = blocks.back().part + 1;
  const Fenced<double> row_sums(static_cast<size_t>(column_blocks * rows), at_end);
  const Fenced<double> column_sums(static_cast<size_t>(row_blocks * op.row.groups * width), at_end);
  for (const Block& b : blocks) {
    GradientTarget to{gradient.data(), accumulate, nullptr, nullptr};
    if (with_sums) {
      to.row_sums = row_sums.data() + b.begin / kGradientColumns * rows;
      to.column_sums = column_sums.data() + b.part * op.row.groups * width;
    }
    kernels.gradient(op, in_place(op) ? x.data() : planes.data() + kSlack, tiles.data() + kSlack,
                     to, b, space.data());
  }
  std::vector<double> want(before.size(), 0.0), by_row(static_cast<size_t>(rows), 0.0);
  std::vector<double> by_column(static_cast<size_t>(op.row.groups * width), 0.0);
  if (accumulate) want.assign(before.begin(), before.end());
  c.for_products([&](int64_t r, int64_t out, int64_t channel, int64_t in, int64_t w) {
    const double a = 2.0 * u[out] * x[in], rs = c.row_scale(r), cs = c.column_scale(channel);
    want[w] += rs * cs * a;
    by_row[r] += cs * c.weight(w) * a;
    by_column[r / op.row.rows * width + w % width] += rs * c.weight(w) * a;
  });
  CHECK(equal(gradient.values(), want));
  CHECK(gradient.tail_intact());
  if (!with_sums) return;
  bool same_rows = true, same_columns = true;
  for (int64_t r = 0; r < rows; ++r) {
    double total = 0.0;
    for (int64_t i = 0; i < column_blocks; ++i) total += row_sums[i * rows + r];
    same_rows = same_rows && total == by_row[r];
  }
  for (int64_t k = 0; k < op.row.groups * width && op.column_scale; ++k) {
    double total = 0.0;
    for (int64_t i = 0; i < row_blocks; ++i) total += column_sums[i * op.row.groups * width + k];
    same_columns = same_columns && total == by_column[k];
  }
  CHECK(same_rows);
  CHECK(same_columns);
}

void test_all(const lmtfast_op_row& row, bool bfloat16, bool tap_major, bool scaled, bool at_end) {
  const Case c(row, bfloat16, tap_major, scaled);
  const Convolution op(c.row(), c.tensor(), c.scales());
  for (const Isa isa : kAllIsas) {
    if (!isa_supported(isa)) continue;
    const ConvolutionKernels& kernels = convolution_kernels(isa);
    for (const int64_t target : {int64_t{1}, int64_t{1} << 40}) {
      test_image(c, op, kernels, target, at_end);
      test_adjoint(c, op, kernels, target, at_end);
    }
    test_gradient(c, op, kernels, false, pick(0, 1) == 1, at_end);
    if (scaled) test_gradient(c, op, kernels, true, pick(0, 1) == 1, at_end);
  }
}

void test_random_geometries() {
  for (int i = 0; i < 160; ++i) {
    test_all(random_stencil(), pick(0, 2) == 0, pick(0, 2) == 0, pick(0, 1) == 0, i % 2 == 0);
  }
}

// Sizes behind one block, tile, depth or panel of some instruction set.
void test_large_sizes() {
  lmtfast_op_row matrix = stencil(0, 1, 700, 300), tall = stencil(2, 1, 690, 3);
  test_all(matrix, false, false, true, true);
  test_all(stencil(0, 1, 3, 5000), true, false, false, true);
  set_axis(tall, 1, 4, 3, 1, 1, 1, 1);
  set_axis(tall, 2, 5, 3, 1, 1, 1, 1);
  test_all(tall, false, true, true, false);
  lmtfast_op_row wide = stencil(2, 1, 5, 290), long_line = stencil(1, 1, 3, 2);
  set_axis(wide, 1, 3, 1, 1, 1, 0, 0);
  set_axis(wide, 2, 7, 1, 1, 1, 0, 0);
  test_all(wide, false, false, false, true);
  set_axis(long_line, 2, 700, 3, 1, 1, 1, 1);
  test_all(long_line, false, false, true, false);
  lmtfast_op_row depthwise = stencil(2, 40, 1, 1), large_kernel = stencil(2, 1, 2, 3);
  set_axis(depthwise, 1, 18, 5, 1, 1, 2, 2);
  set_axis(depthwise, 2, 17, 5, 1, 1, 2, 2);
  test_all(depthwise, false, false, false, true);
  set_axis(large_kernel, 1, 30, 21, 1, 1, 10, 10);
  set_axis(large_kernel, 2, 30, 19, 1, 1, 9, 9);
  test_all(large_kernel, false, false, true, true);
}

void test_norms_of_all_magnitudes() {
  for (const Isa isa : kAllIsas) {
    if (!isa_supported(isa)) continue;
    const ConvolutionKernels& kernels = convolution_kernels(isa);
    for (const float scale : {1e-38f, 1e-20f, 1.0f, 1e30f}) {
      std::vector<float> x(77);
      double want = 0.0;
      for (size_t i = 0; i < x.size(); ++i) {
        x[i] = scale * static_cast<float>(pick(1, 9));
        want += static_cast<double>(x[i]) * x[i];
      }
      const auto n = static_cast<int64_t>(x.size());
      const double got = kernels.sum_of_squares(x.data(), n);
      CHECK(got > 0.0);
      CHECK_NEAR(got / want, 1.0, 1e-14);
      std::vector<float> unit(x.size());
      kernels.multiply(x.data(), 1.0 / std::sqrt(want), unit.data(), n);
      CHECK_NEAR(kernels.sum_of_squares(unit.data(), n), 1.0, 1e-6);
    }
  }
}

}  // namespace

int main() {
  test_random_geometries();
  test_large_sizes();
  test_norms_of_all_magnitudes();
  return check::report();
}
