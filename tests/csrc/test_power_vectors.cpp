// SPDX-License-Identifier: MIT
// Power steps at many frequencies through the C ABI against double, with guard bands around every
// output; symbols that are kept and symbols that are built afresh; what is refused.
#include <complex>
#include <cstdint>
#include <random>

#include "check.h"
#include "guarded.h"
#include "lmtfast/lmtfast.h"

namespace {

using Complex = std::complex<double>;

struct Case {
  lmtfast_power_problem p;
  std::vector<float> acting, terms, start;
  std::vector<int64_t> phase;

  explicit Case(const lmtfast_power_problem& sizes) : p(sizes) {
    std::mt19937_64 generator(static_cast<uint64_t>(p.rows * 31 + p.frequencies));
    std::uniform_real_distribution<float> entry(-1.0f, 1.0f);
    acting.resize(static_cast<size_t>(p.groups * p.rows * p.channels * p.taps));
    for (float& w : acting) w = entry(generator);
    for (int64_t t = 0; t < p.taps; ++t) phase.push_back(t % p.phases);
    for (int64_t i = 0; i < p.frequencies * p.taps; ++i) {
      const double angle = 3.0 * static_cast<double>(entry(generator));
      terms.push_back(static_cast<float>(std::cos(angle)));
      terms.push_back(static_cast<float>(std::sin(angle)));
    }
    const auto width = static_cast<size_t>(p.phases * p.channels);
    start.assign(2 * width, static_cast<float>(1.0 / std::sqrt(2.0 * static_cast<double>(width))));
  }

  int64_t width() const { return p.phases * p.channels; }

  // The vector and the norm at one frequency of one group, by the definition.
  double expected(int64_t group, int64_t w, std::vector<Complex>& x) const {
    const auto n = static_cast<size_t>(width());
    std::vector<std::vector<Complex>> a(static_cast<size_t>(p.rows), std::vector<Complex>(n));
    for (int64_t r = 0; r < p.rows; ++r) {
      for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t t = 0; t < p.taps; ++t) {
          const float* e = terms.data() + (w * p.taps + t) * 2;
          const double value =
              static_cast<double>(acting[((group * p.rows + r) * p.channels + c) * p.taps + t]);
          a[r][phase[t] * p.channels + c] += value * Complex(e[0], e[1]);
        }
      }
    }
    x.clear();
    for (size_t j = 0; j < n; ++j) x.emplace_back(start[2 * j], start[2 * j + 1]);
    double norm = 0.0;
    for (int64_t step = 0; step <= p.steps; ++step) {
      std::vector<Complex> back(n);
      norm = 0.0;
      for (const auto& row : a) {
        Complex u = 0.0;
        for (size_t j = 0; j < n; ++j) u += row[j] * x[j];
        norm += std::norm(u);
        for (size_t j = 0; j < n; ++j) back[j] += std::conj(row[j]) * u;
      }
      if (step == p.steps) break;
      double length = 0.0;
      for (const Complex& v : back) length += std::norm(v);
      for (size_t j = 0; j < n; ++j) x[j] = back[j] / std::sqrt(length);
    }
    return std::sqrt(norm);
  }

  lmtfast_status run(float* norms, float* vectors, int64_t threads) const {
    return lmtfast_power_vectors(&p, acting.data(), phase.data(), terms.data(), start.data(), norms,
                                 vectors, threads);
  }
};

void agrees(const lmtfast_power_problem& sizes) {
  const Case c(sizes);
  const int64_t count = c.p.groups * c.p.frequencies, width = c.width();
  Guarded<float> norms(static_cast<size_t>(count)), vectors(static_cast<size_t>(2 * count * width));
  CHECK(c.run(norms.data(), vectors.data(), 2) == LMTFAST_OK);
  CHECK(norms.intact() && vectors.intact());
  std::vector<Complex> x;
  for (int64_t i = 0; i < count; ++i) {
    const double norm = c.expected(i / c.p.frequencies, i % c.p.frequencies, x);
    CHECK_NEAR(norms[i], norm, 1e-5 * norm);
    for (int64_t j = 0; j < width; ++j) {
      CHECK_NEAR(vectors[2 * (i * width + j)], x[j].real(), 3e-5);
      CHECK_NEAR(vectors[2 * (i * width + j) + 1], x[j].imag(), 3e-5);
    }
  }
}

void refuses() {
  Case c({1, 2, 3, 4, 2, 5, 1});
  std::vector<float> norms(5), vectors(60);
  CHECK(c.run(nullptr, vectors.data(), 1) == LMTFAST_INVALID_ARGUMENT);
  CHECK(c.run(norms.data(), vectors.data(), -1) == LMTFAST_INVALID_ARGUMENT);
  c.phase[1] = 2;
  CHECK(c.run(norms.data(), vectors.data(), 1) == LMTFAST_INVALID_ARGUMENT);
  c.phase[1] = 0;
  c.p.rows = -1;
  CHECK(c.run(norms.data(), vectors.data(), 1) == LMTFAST_INVALID_ARGUMENT);
}

}  // namespace

int main() {
  agrees({1, 1, 1, 1, 1, 1, 3});
  agrees({3, 7, 5, 9, 1, 45, 4});
  agrees({2, 4, 3, 9, 4, 17, 3});
  agrees({1, 16, 16, 25, 1, 16, 2});
  // More than the symbol that is kept: 2 * 16 lanes * rows * width floats.
  agrees({1, 400, 350, 1, 1, 2, 1});
  refuses();
  return check::report();
}
