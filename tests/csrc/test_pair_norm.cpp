// SPDX-License-Identifier: MIT
// Pair norms through the C++ entry points against double: every path, every instruction set this
// machine has, determinism over thread counts, rows that nearly coincide. Guard bands around every
// output.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>

#include "check.h"
#include "core/simd.h"
#include "guarded.h"
#include "ops/pair_norm.h"

using namespace lmtfast;

namespace {

float value_of(float x) { return x; }
float value_of(uint16_t x) { return simd::widen_bfloat16(x); }
void assign(float x, float* y) { *y = x; }
void assign(float x, uint16_t* y) { *y = simd::narrow_bfloat16(x); }

template <class W>
struct Case {
  int64_t k, d, u, stride;
  bool chosen;
  std::vector<W> weight;  // rows of d, then padding that must not be read
  std::vector<int64_t> classes;
  std::vector<float> grad;

  Case(int64_t k_, int64_t d_, int64_t u_, bool chosen_)
      : k(k_),
        d(d_),
        u(chosen_ ? u_ : k_),
        stride(d_ + 3),
        chosen(chosen_),
        weight(static_cast<size_t>(k * stride)),
        classes(static_cast<size_t>(u)),
        grad(static_cast<size_t>(u * k)) {
    std::mt19937_64 generator(static_cast<uint64_t>(k * 1009 + d * 31 + u));
    std::normal_distribution<float> normal;
    for (auto& w : weight) assign(std::numeric_limits<float>::quiet_NaN(), &w);
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t f = 0; f < d; ++f) assign(normal(generator), &weight[j * stride + f]);
    }
    for (int64_t i = 0; i < u; ++i) {
      classes[i] = chosen ? static_cast<int64_t>(generator() % static_cast<uint64_t>(k)) : i;
    }
    for (auto& g : grad) g = normal(generator);
  }
  PairNorm<W> problem(int64_t threads = 1) const {
    return {weight.data(), chosen ? classes.data() : nullptr, k, d, u, stride, threads};
  }
  double at(int64_t row, int64_t f) const {
    return static_cast<double>(value_of(weight[row * stride + f]));
  }
};

template <class W>
struct Result {
  Guarded<float> norms;
  Guarded<W> grad_weight;
  bool equals(Result& o) {
    return std::memcmp(norms.data(), o.norms.data(), norms.size() * sizeof(float)) == 0 &&
           std::memcmp(grad_weight.data(), o.grad_weight.data(), grad_weight.size() * sizeof(W)) ==
               0;
  }
};

template <class W>
Result<W> run(const Case<W>& c, Isa isa = best_isa(), int64_t threads = 1) {
  Result<W> r{Guarded<float>(c.u * c.k), Guarded<W>(c.k * c.d)};
  const auto p = c.problem(threads);
  validate(p);
  cpu::pair_norm_forward(p, r.norms.data(), isa);
  cpu::pair_norm_vjp(p, r.norms.data(), c.grad.data(), r.grad_weight.data(), isa);
  CHECK(r.norms.intact());
  CHECK(r.grad_weight.intact());
  return r;
}

// The largest relative error of a norm, and the largest error of the gradient over its size.
template <class W>
void compare(const Case<W>& c, Result<W>& r, double norm_tolerance, double grad_tolerance) {
  std::vector<double> grad(static_cast<size_t>(c.k * c.d));
  double worst = 0, size = 1e-300;
  for (int64_t i = 0; i < c.u; ++i) {
    for (int64_t j = 0; j < c.k; ++j) {
      double square = 0;
      for (int64_t f = 0; f < c.d; ++f) {
        const double x = c.at(c.classes[i], f) - c.at(j, f);
        square += x * x;
      }
      const double norm = std::sqrt(square);
      const double got = static_cast<double>(r.norms[i * c.k + j]);
      if (norm == 0) {
        CHECK(got == 0);
        continue;
      }
      worst = std::max(worst, std::fabs(got - norm) / norm);
      const double ratio = static_cast<double>(c.grad[i * c.k + j]) / norm;
      for (int64_t f = 0; f < c.d; ++f) {
        const double x = ratio * (c.at(c.classes[i], f) - c.at(j, f));
        grad[c.classes[i] * c.d + f] += x;
        grad[j * c.d + f] -= x;
      }
    }
  }
  CHECK_NEAR(worst, 0.0, norm_tolerance);
  double error = 0;
  for (size_t i = 0; i < grad.size(); ++i) {
    size = std::max(size, std::fabs(grad[i]));
    error = std::max(error, std::fabs(static_cast<double>(value_of(r.grad_weight[i])) - grad[i]));
  }
  CHECK_NEAR(error / size, 0.0, grad_tolerance);
}

template <class W>
void test_shapes(double rounding) {
  // Both sides of kExactClasses, tiles and panels that are full, nearly full and nearly empty, more
  // than one group of columns and one block of the depth.
  const int64_t shapes[][3] = {{1, 1, 1},   {2, 3, 1},    {3, 17, 9},     {10, 64, 4},
                               {32, 5, 40}, {33, 1, 2},   {34, 15, 33},   {97, 31, 5},
                               {96, 33, 7}, {200, 97, 3}, {45, 1030, 15}, {130, 300, 200}};
  for (const auto& shape : shapes) {
    for (const bool chosen : {false, true}) {
      const Case<W> c(shape[0], shape[1], shape[2], chosen);
      for (const Isa isa : kAllIsas) {
        if (!isa_supported(isa)) continue;
        auto single = run(c, isa);
        compare(c, single, 5e-6, 5e-6 + rounding);
        for (const int64_t threads : {2, 3, 7}) {
          auto several = run(c, isa, threads);
          CHECK(single.equals(several));
        }
      }
    }
  }
}

template <class W>
void test_empty() {
  for (const bool chosen : {false, true}) {
    Case<W> none(0, 4, 0, chosen);
    run(none);
    Case<W> flat(40, 0, 3, chosen);
    auto r = run(flat);
    for (size_t i = 0; i < r.norms.size(); ++i) CHECK(r.norms[i] == 0.0f);
  }
  Case<W> no_rows(40, 3, 0, true);
  auto r = run(no_rows);
  for (size_t i = 0; i < r.grad_weight.size(); ++i) CHECK(value_of(r.grad_weight[i]) == 0.0f);
}

// Small integers: squared distances have no rounding, whatever the order of the sums.
template <class W>
void test_integers() {
  for (const int64_t k : {7, 40, 150}) {
    for (const bool chosen : {false, true}) {
      Case<W> c(k, 129, 20, chosen);
      std::mt19937_64 generator(3);
      for (int64_t j = 0; j < k; ++j) {
        for (int64_t f = 0; f < c.d; ++f) {
          assign(static_cast<float>(generator() % 17) - 8.0f, &c.weight[j * c.stride + f]);
        }
      }
      for (const Isa isa : kAllIsas) {
        if (!isa_supported(isa)) continue;
        auto r = run(c, isa);
        for (int64_t i = 0; i < c.u; ++i) {
          for (int64_t j = 0; j < k; ++j) {
            double square = 0;
            for (int64_t f = 0; f < c.d; ++f) {
              square += (c.at(c.classes[i], f) - c.at(j, f)) * (c.at(c.classes[i], f) - c.at(j, f));
            }
            CHECK(r.norms[i * k + j] == std::sqrt(static_cast<float>(square)));
          }
        }
      }
    }
  }
}

// Rows that nearly coincide, far from the origin: products alone would leave nothing.
void test_close_rows() {
  for (const int64_t k : {8, 60}) {
    for (const bool chosen : {false, true}) {
      Case<float> c(k, 70, 30, chosen);
      for (int64_t j = 0; j < k; ++j) {
        for (int64_t f = 0; f < c.d; ++f) {
          float& w = c.weight[j * c.stride + f];
          w = 5.0f + (j % 3 == 0 ? 1e-5f : 1.0f) * w;
        }
      }
      for (const Isa isa : kAllIsas) {
        if (!isa_supported(isa)) continue;
        auto r = run(c, isa);
        compare(c, r, 2e-5, 1e-5);
      }
    }
  }
}

// Rows of every magnitude: the small ones lie close together, far from the mean.
template <class W>
void test_outliers(double rounding) {
  for (const bool chosen : {false, true}) {
    Case<W> c(60, 70, 90, chosen);
    for (int64_t j = 0; j < c.k; ++j) {
      for (int64_t f = 0; f < c.d; ++f) {
        W& w = c.weight[j * c.stride + f];
        assign(value_of(w) * std::pow(10.0f, 0.2f * static_cast<float>(j) - 6.0f), &w);
      }
    }
    for (const Isa isa : kAllIsas) {
      if (!isa_supported(isa)) continue;
      auto single = run(c, isa), several = run(c, isa, 3);
      compare(c, single, 2e-5, 1e-5 + rounding);
      CHECK(single.equals(several));
    }
  }
}

// Squares that overflow or vanish in float, and duplicates.
void test_range() {
  for (const int64_t k : {5, 50}) {
    for (const float scale : {1e-30f, 1e25f}) {
      Case<float> c(k, 20, 6, true);
      for (int64_t j = 0; j < k; ++j) {
        for (int64_t f = 0; f < c.d; ++f) c.weight[j * c.stride + f] *= scale;
      }
      std::copy_n(c.weight.data(), c.d, c.weight.data() + 2 * c.stride);
      auto r = run(c);
      double worst = 0;
      for (int64_t i = 0; i < c.u; ++i) {
        for (int64_t j = 0; j < k; ++j) {
          double square = 0;
          for (int64_t f = 0; f < c.d; ++f)
            square += std::pow(c.at(c.classes[i], f) - c.at(j, f), 2);
          const double got = static_cast<double>(r.norms[i * k + j]);
          if (square == 0) CHECK(got == 0);
          if (square > 0) worst = std::max(worst, std::fabs(got / std::sqrt(square) - 1));
        }
      }
      CHECK_NEAR(worst, 0.0, 1e-5);
    }
  }
}

void test_nan_shows() {
  for (const int64_t k : {5, 50}) {
    Case<float> c(k, 20, 0, false);
    c.weight[3 * c.stride + 7] = std::numeric_limits<float>::quiet_NaN();
    auto r = run(c);
    for (int64_t j = 0; j < k; ++j) {
      CHECK(j == 3 ? r.norms[3 * k + j] == 0.0f : std::isnan(r.norms[3 * k + j]));
      CHECK(j == 3 || std::isnan(r.norms[j * k + 3]));
      CHECK(std::isnan(r.grad_weight[j * c.d]));  // every row has a distance to row 3
    }
  }
}

}  // namespace

int main() {
  test_shapes<float>(0);
  test_shapes<uint16_t>(4e-3);
  test_empty<float>();
  test_empty<uint16_t>();
  test_integers<float>();
  test_integers<uint16_t>();
  test_close_rows();
  test_outliers<float>(0);
  test_outliers<uint16_t>(8e-3);
  test_range();
  test_nan_shows();
  return check::report();
}
