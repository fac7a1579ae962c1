// SPDX-License-Identifier: MIT
// The separable engine's inner loops on every instruction set of this machine, against plain sums in
// double, with sentinels around every output; the grid's windows and their adjoint.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "core/simd.h"
#include "ops/cpu/grid.h"
#include "ops/cpu/separable_kernels.h"

using namespace lmtfast;
using namespace lmtfast::cpu;

namespace {

std::mt19937 generator(7);

template <class T>
std::vector<T> random(int64_t size) {
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<size_t>(size));
  for (T& value : values) value = static_cast<T>(normal(generator));
  return values;
}

// An output with 32 sentinels on either side.
class Fenced {
 public:
  explicit Fenced(int64_t size, float fill = 0.0f)
      : values_(static_cast<size_t>(size) + 2 * kBand, kSentinel), size_(size) {
    for (int64_t i = 0; i < size; ++i) data()[i] = fill;
  }
  float* data() { return values_.data() + kBand; }
  float operator[](int64_t i) const { return values_[kBand + i]; }
  bool intact() const {
    for (size_t i = 0; i < kBand; ++i) {
      if (values_[i] != kSentinel || values_[kBand + size_ + i] != kSentinel) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kBand = 32;
  static constexpr float kSentinel = -12345.0f;
  std::vector<float> values_;
  size_t size_;
};

// Rows of lanes whose entries past `rank` are zero.
std::vector<float> ranked(int64_t rows, int64_t rank, int64_t lanes) {
  std::vector<float> values = random<float>(rows * lanes);
  for (int64_t i = 0; i < rows * lanes; ++i) {
    if (i % lanes >= rank) values[i] = 0.0f;
  }
  return values;
}

struct Shape {
  int64_t rows, channels, taps, rank;
  bool tap_major;

  int64_t at(int64_t row, int64_t channel, int64_t tap) const {
    return row * channels * taps + (tap_major ? tap * channels + channel : channel * taps + tap);
  }
};

void test_passes(const SeparableKernels& kernels, const Shape& s) {
  const int64_t lanes = lanes_of(s.rank), width = width_of(s.taps, lanes);
  const auto w = random<float>(s.rows * s.channels * s.taps);
  const auto a = ranked(s.channels, s.rank, lanes), m = random<float>(s.rows * width);
  const KernelRows<const float> rows{w.data(), s.rows, s.channels, s.taps, s.tap_major};
  Fenced y(s.rows * width, 7.0f), b(s.channels * lanes, 0.5f);
  kernels.apply(rows, lanes, a.data(), y.data(), width);
  kernels.pull(rows, lanes, m.data(), width, b.data());
  const double length = 1e-6 * std::sqrt(static_cast<double>(s.channels * s.taps * s.rows)) + 1e-6;
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      double sum = i < s.taps * lanes ? 0.0 : 7.0;  // what lies behind the taps is not touched
      for (int64_t c = 0; i < s.taps * lanes && c < s.channels; ++c) {
        sum += static_cast<double>(w[s.at(r, c, i / lanes)]) * a[c * lanes + i % lanes];
      }
      CHECK_NEAR(y[r * width + i], sum, 4 * length);
    }
  }
  for (int64_t i = 0; i < s.channels * lanes; ++i) {
    double sum = 0.5;
    for (int64_t r = 0; r < s.rows; ++r) {
      for (int64_t t = 0; t < s.taps; ++t) {
        sum += static_cast<double>(w[s.at(r, i / lanes, t)]) * m[r * width + t * lanes + i % lanes];
      }
    }
    CHECK_NEAR(b[i], sum, 4 * length);
  }
  for (const bool add : {false, true}) {
    Fenced g(s.rows * s.channels * s.taps, 3.0f);
    kernels.outer({g.data(), s.rows, s.channels, s.taps, s.tap_major}, lanes, m.data(), width,
                  a.data(), add);
    for (int64_t r = 0; r < s.rows; ++r) {
      for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t t = 0; t < s.taps; ++t) {
          double sum = add ? 3.0 : 0.0;
          for (int64_t k = 0; k < lanes; ++k) {
            sum += static_cast<double>(m[r * width + t * lanes + k]) * a[c * lanes + k];
          }
          CHECK_NEAR(g[s.at(r, c, t)], sum, 2e-5);
        }
      }
    }
    CHECK(g.intact());
  }
  CHECK(y.intact() && b.intact());
}

void test_products(const SeparableKernels& kernels, int64_t rows, int64_t taps, int64_t lanes) {
  const int64_t depth = taps * lanes, width = width_of(taps, lanes);
  auto x = random<float>(rows * width);
  const auto b = random<float>(depth * width);
  for (int64_t i = 0; i < rows * width; ++i) {
    if (i % width >= depth) x[i] = 0.0f;
  }
  Fenced z(rows * width), g(depth * width, 1.0f);
  kernels.multiply(rows, depth, width, x.data(), b.data(), z.data());
  kernels.square(rows, depth, width, x.data(), g.data());
  const double tolerance = 1e-5 * std::sqrt(static_cast<double>(rows + depth));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < width; ++j) {
      double sum = 0.0;
      for (int64_t q = 0; q < depth; ++q) {
        sum += static_cast<double>(x[i * width + q]) * b[q * width + j];
      }
      CHECK_NEAR(z[i * width + j], sum, tolerance);
    }
  }
  for (int64_t i = 0; i < depth; ++i) {
    for (int64_t j = i; j < depth; ++j) {
      double sum = 1.0;
      for (int64_t r = 0; r < rows; ++r) {
        sum += static_cast<double>(x[r * width + i]) * x[r * width + j];
      }
      CHECK_NEAR(g[i * width + j], sum, tolerance);
    }
  }
  double sum = 0.0;
  for (int64_t i = 0; i < rows * width; ++i) sum += static_cast<double>(x[i]) * z[i];
  CHECK_NEAR(kernels.dot(rows * width, x.data(), z.data()), sum, 1e-4 * std::abs(sum) + 1e-2);
  CHECK(z.intact() && g.intact());
}

// x = Q R, Q's columns orthonormal, R upper triangular; zero columns are completed.
void test_basis(const SeparableKernels& kernels, int64_t rows, int64_t rank, bool zero) {
  const int64_t lanes = lanes_of(rank);
  std::vector<double> x = random<double>(rows * lanes), triangle(lanes * lanes, 9.0);
  for (int64_t i = 0; i < rows * lanes; ++i) {
    if (i % lanes >= rank || (zero && i % lanes == rank / 2)) x[i] = 0.0;
  }
  std::vector<double> q = x;
  kernels.orthonormalise(rows, rank, lanes, q.data(), triangle.data());
  for (int64_t j = 0; j < lanes; ++j) {
    for (int64_t k = 0; k < lanes; ++k) {
      double sum = 0.0;
      for (int64_t i = 0; i < rows; ++i) sum += q[i * lanes + j] * q[i * lanes + k];
      CHECK_NEAR(sum, j == k && j < rank ? 1.0 : 0.0, 1e-13);
      if (k < j || j >= rank) CHECK(triangle[j * lanes + k] == 0.0);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < rank; ++k) {
      double sum = 0.0;
      for (int64_t j = 0; j < rank; ++j) sum += q[i * lanes + j] * triangle[j * lanes + k];
      CHECK_NEAR(sum, x[i * lanes + k], 1e-12);
    }
  }
  std::vector<double> turned = x;
  kernels.turn(rows, lanes, triangle.data(), turned.data());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < lanes; ++k) {
      double sum = 0.0;
      for (int64_t j = 0; j < lanes; ++j) sum += x[i * lanes + j] * triangle[k * lanes + j];
      CHECK_NEAR(turned[i * lanes + k], sum, 1e-11);
    }
  }
}

void test_loops(const SeparableKernels& kernels, int64_t size) {
  auto x = random<float>(size);
  Fenced y(size), wide(size);
  std::vector<uint16_t> halves;
  double largest = 0.0;
  for (int64_t i = 0; i < size; ++i) {
    y.data()[i] = x[i];
    halves.push_back(static_cast<uint16_t>(i * 9973));
    largest = std::max(largest, std::abs(static_cast<double>(x[i])));
  }
  CHECK(kernels.largest(size, x.data()) == static_cast<float>(largest));
  kernels.rescale(size, 1.0 / 3.0, y.data());
  kernels.widen(size, halves.data(), wide.data());
  for (int64_t i = 0; i < size; ++i) {
    CHECK(y[i] == static_cast<float>(static_cast<double>(x[i]) * (1.0 / 3.0)));
    const float want = simd::widen_bfloat16(halves[i]);
    CHECK(wide[i] == want || (std::isnan(wide[i]) && std::isnan(want)));
  }
  CHECK(y.intact() && wide.intact());
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    x[size / 2] = bad;
    CHECK(std::isnan(kernels.largest(size, x.data())));
  }
}

lmtfast_op_row grid_row(bool circular) {
  std::uniform_int_distribution<int64_t> small(1, 3), size(1, 6), pad(0, 2);
  lmtfast_op_row row{};
  for (int axis = 0; axis < LMTFAST_OP_ROW_AXES; ++axis) {
    row.in[axis] = size(generator) + 1;
    row.kernel[axis] = small(generator);
    row.stride[axis] = small(generator);
    row.dilation[axis] = small(generator);
    row.pad_low[axis] = std::min(row.in[axis], pad(generator));
    row.pad_high[axis] = std::min(row.in[axis], pad(generator));
    const int64_t reach = row.in[axis] + row.pad_low[axis] + row.pad_high[axis] -
                          row.dilation[axis] * (row.kernel[axis] - 1);
    if (reach < 1) return grid_row(circular);
    row.out[axis] = (reach - 1) / row.stride[axis] + 1;
  }
  row.circular = circular;
  return row;
}

void test_grid(const SeparableKernels& kernels, bool circular, int64_t lanes) {
  const lmtfast_op_row row = grid_row(circular);
  const Grid grid(row);
  const int64_t count = row.kernel[0] * row.kernel[1] * row.kernel[2];
  const int64_t width = width_of(count, lanes), n = grid.inputs(), m = grid.points();
  std::vector<float> h = random<float>((n + 1) * lanes);
  for (int64_t k = 0; k < lanes; ++k) h[n * lanes + k] = 0.0f;
  Fenced windows(m * width, 5.0f), folded(n * lanes, 5.0f);
  grid.gather(h.data(), lanes, 2.0f, 0, m / 2, windows.data(), width);
  grid.gather(h.data(), lanes, 2.0f, m / 2, m, windows.data() + m / 2 * width, width);
  const auto other = random<float>(m * width);
  grid.fold(kernels, other.data(), width, lanes, 0, n / 3, folded.data());
  grid.fold(kernels, other.data(), width, lanes, n / 3, n, folded.data());
  std::vector<double> want(static_cast<size_t>(n * lanes), 0.0);
  for (int64_t o = 0; o < m; ++o) {
    const int64_t out[] = {o / (row.out[1] * row.out[2]), o / row.out[2] % row.out[1],
                           o % row.out[2]};
    for (int64_t t = 0; t < count; ++t) {
      const int64_t tap[] = {t / (row.kernel[1] * row.kernel[2]), t / row.kernel[2] % row.kernel[1],
                             t % row.kernel[2]};
      int64_t source = 0;
      bool inside = true;
      for (int axis = 0; axis < LMTFAST_OP_ROW_AXES; ++axis) {
        const int64_t size = row.in[axis];
        int64_t at =
            row.stride[axis] * out[axis] + row.dilation[axis] * tap[axis] - row.pad_low[axis];
        inside = inside && (circular || (at >= 0 && at < size));
        source = source * size + (at + size) % size;
      }
      for (int64_t k = 0; k < lanes; ++k) {
        const float seen = inside ? 2.0f * h[source * lanes + k] : 0.0f;
        CHECK(windows[o * width + t * lanes + k] == seen);
        if (inside) want[source * lanes + k] += other[o * width + t * lanes + k];
      }
    }
    for (int64_t i = count * lanes; i < width; ++i) CHECK(windows[o * width + i] == 0.0f);
  }
  for (int64_t i = 0; i < n * lanes; ++i) CHECK_NEAR(folded[i], want[i], 1e-4);
  CHECK(windows.intact() && folded.intact());
}

}  // namespace

int main() {
  for (const Isa isa : kAllIsas) {
    if (!isa_supported(isa)) continue;
    const SeparableKernels& kernels = separable_kernels(isa);
    for (const bool tap_major : {false, true}) {
      for (const int64_t rank : {1, 2, 4, 5, 8}) {
        for (const int64_t taps : {1, 2, 3, 8, 9, 10, 17, 25}) {
          test_passes(kernels, {1, 1, taps, rank, tap_major});
          test_passes(kernels, {11, 13, taps, rank, tap_major});
        }
        test_passes(kernels, {19, 261, 4, rank, tap_major});
      }
    }
    for (const int64_t lanes : {1, 4, 8}) {
      for (const int64_t taps : {1, 2, 5, 9, 27}) {
        for (const int64_t rows : {1, 3, 4, 50}) test_products(kernels, rows, taps, lanes);
      }
    }
    for (int64_t rank = 1; rank <= kLanes; ++rank) {
      for (const int64_t rows : {rank, rank + 1, int64_t{70}}) {
        test_basis(kernels, rows, rank, false);
        test_basis(kernels, rows, rank, true);
      }
    }
    for (const int64_t size : {1, 7, 16, 33, 1000}) test_loops(kernels, size);
    for (int trial = 0; trial < 40; ++trial) {
      for (const int64_t lanes : {1, 4, 8}) test_grid(kernels, trial % 2 == 1, lanes);
    }
  }
  return check::report();
}
