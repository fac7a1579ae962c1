// SPDX-License-Identifier: MIT
// The products of single operators by the CUDA kernels, emulated: with small integers every sum is
// exact in any order, so they must equal those of a plain loop bit for bit.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_emulation.h"
#include "ops/cuda/spectral.h"
#include "ops/cuda/view.h"

namespace {

using lmtfast::cuda::Item;
using lmtfast::cuda::OpWork;
using lmtfast::cuda::PlanHeader;
using lmtfast::cuda::Stage;
using lmtfast::cuda::View;

struct Shape {
  std::string name;
  int64_t engine, groups, rows, channels;
  std::vector<int64_t> in, kernel, stride, pad, dilation;
  bool transposed = false, circular = false, tap_major = false, bfloat16 = false;
};

lmtfast_op_row row_of(const Shape& shape) {
  lmtfast_op_row row = {};
  row.kind = 1;
  row.engine = shape.engine;
  row.axes = static_cast<int64_t>(shape.in.size());
  row.groups = shape.groups;
  row.rows = shape.rows;
  row.channels = shape.channels;
  row.transposed = shape.transposed;
  row.circular = shape.circular;
  for (int64_t a = 0; a < LMTFAST_OP_ROW_AXES; ++a) {
    const int64_t i = a - (LMTFAST_OP_ROW_AXES - row.axes);
    row.in[a] = i < 0 ? 1 : shape.in[i];
    row.kernel[a] = i < 0 ? 1 : shape.kernel[i];
    row.stride[a] = i < 0 ? 1 : shape.stride[i];
    row.dilation[a] = i < 0 ? 1 : shape.dilation[i];
    row.pad_low[a] = row.pad_high[a] = i < 0 ? 0 : shape.pad[i];
    row.out[a] = (row.in[a] + 2 * row.pad_low[a] - row.dilation[a] * (row.kernel[a] - 1) - 1) /
                     row.stride[a] +
                 1;
  }
  row.rank = 1;
  row.row_scale = row.column_scale = -1;
  return row;
}

std::vector<float> integers(int64_t n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<float> values(static_cast<size_t>(n));
  for (auto& x : values) x = static_cast<float>(static_cast<int>(random() % 7) - 3);
  return values;
}

// One operator, its plan and its buffers.
class Operator {
 public:
  Operator(const Shape& shape, int64_t shared_bytes)
      : row(row_of(shape)),
        taps(lmtfast::taps(row)),
        inputs(lmtfast::volume(row.in)),
        outputs(lmtfast::volume(row.out)),
        tap_major(shape.tap_major) {
    weight = integers(row.groups * row.rows * row.channels * taps, 1);
    for (const float w : weight) {
      halves.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(w) >> 16));
    }
    const int64_t inside = row.groups * row.channels * inputs;
    const int64_t outside = row.groups * row.rows * outputs;
    saved.assign(static_cast<size_t>(std::max(inside + outside, lmtfast::saved_entries(row))), 0);
    state.assign(static_cast<size_t>(std::max({inside, outside, lmtfast::state_entries(row)})), 0);
    next = state;
    const lmtfast_network network{&row,
                                  nullptr,
                                  nullptr,
                                  1,
                                  0,
                                  0,
                                  0,
                                  0,
                                  0,
                                  static_cast<int64_t>(saved.size()),
                                  static_cast<int64_t>(state.size())};
    table = lmtfast::cuda::make_plan(network, shared_bytes);
    doubles.assign(static_cast<size_t>(header().doubles), 0.0);
    floats.assign(static_cast<size_t>(header().floats + 4), NAN);
    const lmtfast_tensor tensor{
        shape.bfloat16 ? static_cast<void*>(halves.data()) : static_cast<void*>(weight.data()),
        shape.bfloat16 ? LMTFAST_BFLOAT16 : LMTFAST_FLOAT32, static_cast<int64_t>(weight.size()),
        shape.tap_major};
    word = lmtfast::cuda::tensor_word(tensor);
  }

  const PlanHeader& header() const { return lmtfast::cuda::header_of(table.data()); }
  const OpWork& work() const { return *reinterpret_cast<const OpWork*>(&table[header().work]); }
  unsigned blocks(Stage stage) const { return static_cast<unsigned>(header().blocks[stage]); }
  float* aligned() {
    const auto address = reinterpret_cast<uintptr_t>(floats.data());
    return reinterpret_cast<float*>((address + 15) / 16 * 16);
  }
  View view(Stage stage) {
    View v = {};
    v.rows = reinterpret_cast<const lmtfast_op_row*>(&table[header().rows]);
    v.work = &work();
    v.items = reinterpret_cast<const Item*>(&table[header().stage[stage]]);
    v.tensors = &word;
    v.doubles = doubles.data();
    v.floats = aligned();
    v.state = state.data();
    v.new_state = next.data();
    v.saved = saved.data();
    v.sigmas = &sigma;
    v.counters = &done;
    v.n_rows = v.n_tensors = 1;
    return v;
  }
  double at(int64_t g, int64_t o, int64_t c, int64_t t) const {
    const int64_t column = tap_major ? t * row.channels + c : c * taps + t;
    return weight[(g * row.rows + o) * row.channels * taps + column];
  }

  lmtfast_op_row row;
  int64_t taps, inputs, outputs;
  bool tap_major;
  std::vector<float> weight, saved, state, next;
  float sigma = NAN;
  int done = 0;
  std::vector<uint16_t> halves;
  std::vector<int64_t> table;
  std::vector<double> doubles;
  std::vector<float> floats;
  uint64_t word;
};

// body(weight, entry of the stencil's input, entry of its output) for every product of the stencil.
template <class Body>
void for_each_term(const Operator& op, const Body& body) {
  const lmtfast_op_row& r = op.row;
  for (int64_t p = 0; p < op.outputs; ++p) {
    const int64_t out[3] = {p / (r.out[1] * r.out[2]), p / r.out[2] % r.out[1], p % r.out[2]};
    for (int64_t t = 0; t < op.taps; ++t) {
      const int64_t tap[3] = {t / (r.kernel[1] * r.kernel[2]), t / r.kernel[2] % r.kernel[1],
                              t % r.kernel[2]};
      int64_t q = 0;
      bool inside = true;
      for (int a = 0; a < 3; ++a) {
        int64_t i = out[a] * r.stride[a] + tap[a] * r.dilation[a] - r.pad_low[a];
        if (r.circular) i = (i + r.in[a]) % r.in[a];
        inside = inside && i >= 0 && i < r.in[a];
        q = q * r.in[a] + i;
      }
      if (!inside) continue;
      for (int64_t g = 0; g < r.groups; ++g) {
        for (int64_t o = 0; o < r.rows; ++o) {
          for (int64_t c = 0; c < r.channels; ++c) {
            body(op.at(g, o, c, t), (g * r.channels + c) * op.inputs + q,
                 (g * r.rows + o) * op.outputs + p);
          }
        }
      }
    }
  }
}

bool equal(const float* got, const std::vector<double>& want) {
  for (size_t i = 0; i < want.size(); ++i) {
    if (static_cast<double>(got[i]) != want[i]) return false;
  }
  return true;
}

// Integers x over their length, as a block scales them; their squares are summed without rounding.
std::vector<double> unit(const std::vector<double>& x, double* length) {
  double square = 0;
  for (const double entry : x) square += entry * entry;
  *length = std::sqrt(square);
  const float factor = *length == 0.0 ? 1.0f : static_cast<float>(1.0 / *length);
  std::vector<double> scaled;
  for (const double entry : x) {
    scaled.push_back(static_cast<double>(static_cast<float>(entry) * factor));
  }
  return scaled;
}

// A v, then A^T u, as the two launches of a power step have them; norms of 1 leave what they read
// alone.
void test_convolution(const Shape& shape, uint64_t seed) {
  const int before = check::failures;
  Operator op(shape, 227 << 10);
  const size_t inside = static_cast<size_t>(op.row.groups * op.row.channels * op.inputs);
  const size_t outside = static_cast<size_t>(op.row.groups * op.row.rows * op.outputs);
  const bool transposed = shape.transposed;
  op.state = integers(static_cast<int64_t>(transposed ? outside : inside), seed + 2);
  const std::vector<double> v(op.state.begin(), op.state.end());
  op.doubles[op.work().input_sums] = op.doubles[op.work().image_sums] = 1.0;
  std::vector<double> image(transposed ? inside : outside, 0.0);
  for_each_term(op, [&](double w, int64_t q, int64_t p) {
    image[transposed ? q : p] += w * v[transposed ? p : q];
  });
  lmtfast::emulation::set_order(seed);
  const Stage first = transposed ? lmtfast::cuda::kFirstAdjoint : lmtfast::cuda::kFirstImage;
  const std::vector<double> sums = op.doubles;
  launch_stencil(op.view(first), transposed, false, op.blocks(first), nullptr);
  float* raw = op.aligned() + op.work().image;
  CHECK(equal(raw, image));
  CHECK(op.done == 0);

  // Nothing moves: the same launch goes on to u, v and sigma.
  double length = 0;
  op.doubles = sums;
  View only = op.view(first);
  only.new_state = nullptr;
  launch_stencil(only, transposed, false, op.blocks(first), nullptr);
  CHECK(equal(op.saved.data(), unit(image, &length)));
  CHECK(op.sigma == static_cast<float>(length));
  CHECK(equal(op.saved.data() + image.size(), v));
  CHECK(op.done == static_cast<int>(op.work().images));

  const Stage second = transposed ? lmtfast::cuda::kSecondImage : lmtfast::cuda::kSecondAdjoint;
  for (const bool zero : {false, true}) {
    op.doubles = sums;
    op.done = 0;
    std::vector<float> u = integers(static_cast<int64_t>(image.size()), seed + 3);
    if (zero) u.assign(u.size(), 0.0f);
    std::copy(u.begin(), u.end(), raw);
    std::vector<double> back(v.size(), 0.0);
    for_each_term(op, [&](double w, int64_t q, int64_t p) {
      back[transposed ? p : q] += w * static_cast<double>(u[transposed ? q : p]);
    });
    launch_stencil(op.view(second), !transposed, true, op.blocks(second), nullptr);
    CHECK(equal(op.aligned() + op.work().back, back));
    // Where A^T u is zero the iterate stays.
    const std::vector<double> next = unit(back, &length);
    CHECK(equal(op.next.data(), length == 0.0 ? v : next));
    CHECK(equal(op.saved.data(), {u.begin(), u.end()}));
    CHECK(equal(op.saved.data() + u.size(), length == 0.0 ? v : next));
    CHECK(op.sigma == static_cast<float>(length));
    CHECK(op.done == static_cast<int>(op.work().backs));
  }
  lmtfast::emulation::set_order(0);
  if (check::failures > before) std::printf("in %s\n", shape.name.c_str());
}

// W x and W^T (W x) by one pass: the tiles' sums times their powers of two, added up.
void test_pass(const Shape& shape, int64_t shared_bytes, uint64_t seed) {
  const int before = check::failures;
  Operator op(shape, shared_bytes);
  const auto& pass = op.work().pass;
  const int64_t columns = op.row.channels * op.taps, width = pass.columns * pass.subsets;
  const int64_t entries = lmtfast::phases(op.row) * op.row.channels;
  const int64_t pitch = lmtfast::cuda::vector_pitch(entries);
  const std::vector<float> x = integers(op.row.groups * entries * width, seed + 5);
  const auto x_at = [&](int64_t g, int64_t entry, int64_t c) {
    return x[(g * entries + entry) * width + c];
  };
  for (int64_t g = 0; g < op.row.groups; ++g) {
    for (int64_t subset = 0; subset < pass.subsets; ++subset) {
      float* factors = op.aligned() + op.work().panel + (g * pass.subsets + subset) * pass.vector;
      float* e = factors + 4 * pitch * pass.columns;
      for (int64_t c = 0; c < pass.columns; ++c) {
        for (int64_t i = 0; i < entries; ++i) {
          const int64_t slot = lmtfast::cuda::vector_slot(i, pitch);
          factors[slot * pass.columns + c] = x_at(g, i, subset * pass.columns + c);
        }
        for (int64_t t = 0; t < op.taps; ++t) {
          // At frequency zero; every tap reads the first phase.
          e[t * pass.columns + c] = c % 2 == 0 ? 1.0f : 0.0f;
          e[op.taps * pass.columns + t] = std::bit_cast<float>(int32_t{0});
        }
      }
    }
  }
  lmtfast::emulation::set_order(seed);
  launch_pass(op.view(lmtfast::cuda::kPass), op.blocks(lmtfast::cuda::kPass),
              op.header().pass_bytes, nullptr);
  lmtfast::emulation::set_order(0);
  const int64_t per_word = shape.bfloat16 ? 8 : 4;
  bool images = true, backs = true;
  for (int64_t g = 0; g < op.row.groups; ++g) {
    std::vector<double> image(static_cast<size_t>(op.row.rows * width), 0.0);
    std::vector<double> back(static_cast<size_t>(columns * width), 0.0);
    for (int64_t o = 0; o < op.row.rows; ++o) {
      for (int64_t c = 0; c < width; ++c) {
        double& y = image[o * width + c];
        for (int64_t i = 0; i < columns; ++i) {
          y += op.at(g, o, i / op.taps, i % op.taps) * static_cast<double>(x_at(g, i / op.taps, c));
        }
        const float got =
            op.aligned()[op.work().image + (g * op.row.rows + o) * lmtfast::cuda::kPassColumns + c];
        images = images && static_cast<double>(got) == y;
        for (int64_t i = 0; i < columns; ++i) {
          const int64_t at = op.tap_major ? i % op.taps * op.row.channels + i / op.taps : i;
          back[at * width + c] += op.at(g, o, i / op.taps, i % op.taps) * y;
        }
      }
    }
    for (int64_t i = 0; i < columns * width; ++i) {
      const int64_t c = i % width, subset = c / pass.columns;
      double sum = 0;
      for (int64_t tile = 0; tile < pass.tiles; ++tile) {
        const int64_t block = (g * pass.tiles + tile) * pass.subsets + subset;
        const int64_t at =
            lmtfast::cuda::sum_index(columns, per_word, pass.columns, i / width, c % pass.columns);
        sum += op.doubles[op.work().powers + block] *
               static_cast<double>(
                   op.aligned()[op.work().partial + block * pass.padded * pass.columns + at]);
      }
      backs = backs && sum == back[i];
    }
  }
  CHECK(images);
  CHECK(backs);
  if (check::failures > before) std::printf("in %s\n", shape.name.c_str());
}

constexpr int64_t kPower = LMTFAST_OPERATOR, kSymbol = LMTFAST_SYMBOL;

std::vector<Shape> convolutions() {
  std::vector<Shape> shapes = {
      {"below a tile", kPower, 1, 3, 2, {5, 5}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {"rows and columns", kPower, 1, 29, 31, {9, 7}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {"deep", kPower, 1, 17, 300, {4, 4}, {1, 1}, {1, 1}, {0, 0}, {1, 1}},
      {"many rows", kPower, 1, 130, 5, {3, 3}, {1, 1}, {1, 1}, {0, 0}, {1, 1}},
      {"long", kPower, 1, 5, 3, {21, 25}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {"strided", kPower, 1, 6, 5, {8, 9}, {3, 2}, {2, 3}, {1, 0}, {1, 2}},
      {"sparse", kPower, 1, 3, 4, {11, 12}, {2, 2}, {3, 4}, {0, 1}, {1, 1}},
      {"groups", kPower, 3, 2, 4, {6, 7}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {"depthwise", kPower, 24, 1, 1, {7, 8}, {5, 5}, {1, 1}, {2, 2}, {1, 1}},
      {"line", kPower, 1, 7, 3, {19}, {4}, {3}, {2}, {1}},
      {"volume", kPower, 1, 4, 3, {4, 3, 5}, {3, 2, 3}, {1, 1, 2}, {1, 1, 1}, {1, 1, 1}},
      {"large kernel", kPower, 1, 2, 3, {15, 14}, {13, 11}, {1, 1}, {6, 5}, {1, 1}},
  };
  const size_t plain = shapes.size();
  for (size_t i = 0; i < plain; ++i) {
    Shape s = shapes[i];
    s.name += ", transposed";
    s.transposed = true;
    shapes.push_back(s);
  }
  for (const size_t i : {size_t{1}, size_t{5}, size_t{10}}) {
    Shape s = shapes[i];
    s.name += ", tap-major, bfloat16";
    s.tap_major = s.bfloat16 = true;
    shapes.push_back(s);
  }
  Shape circular = shapes[1];
  circular.name = "circular";
  circular.circular = true;
  shapes.push_back(circular);
  return shapes;
}

std::vector<Shape> passes() {
  std::vector<Shape> shapes = {
      {"matrix", kPower, 1, 37, 70, {}, {}, {}, {}, {}},
      {"tall matrix", kPower, 1, 600, 3, {}, {}, {}, {}, {}},
      {"long matrix", kPower, 1, 60, 6300, {}, {}, {}, {}, {}},
      {"symbol", kSymbol, 1, 21, 19, {5, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {"wide symbol", kSymbol, 1, 10, 150, {5, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
      {"groups", kSymbol, 3, 6, 4, {5, 6}, {3, 3}, {2, 1}, {1, 1}, {1, 1}},
  };
  const size_t plain = shapes.size();
  for (size_t i = 0; i < plain; ++i) {
    Shape s = shapes[i];
    s.name += ", bfloat16";
    s.bfloat16 = true;
    shapes.push_back(s);
    s = shapes[i];
    s.name += ", tap-major";
    s.tap_major = true;
    if (!s.kernel.empty()) shapes.push_back(s);
  }
  return shapes;
}

}  // namespace

int main() {
  for (const Shape& shape : convolutions()) {
    for (const uint64_t seed : {0, 1}) test_convolution(shape, seed);
  }
  for (const Shape& shape : passes()) {
    for (const int64_t kib : {227, 40, 16, 4}) test_pass(shape, kib << 10, kib == 227 ? 0 : 1);
  }
  return check::report();
}
