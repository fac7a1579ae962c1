// SPDX-License-Identifier: MIT
// Margin cross-entropy through the C++ entry points: published numbers, edge cases, every
// instruction set this machine has, determinism over thread counts. Guard bands around every
// output.
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>

#include "check.h"
#include "guarded.h"
#include "ops/margin_cross_entropy.h"

using namespace lmtfast;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class T>
struct Case {
  int64_t n, k, u, stride;
  lmtfast_margin_member member;
  std::vector<T> logits, rows, coefficient, grad_loss;
  std::vector<int64_t> target, row_index;

  Case(int64_t n_, int64_t k_, int64_t u_, lmtfast_margin_member member_, int64_t padding = 0)
      : n(n_),
        k(k_),
        u(u_),
        stride(k_ + padding),
        member(member_),
        logits(n_ * stride, T(kNan)),
        rows(u_ * k_),
        coefficient(n_, T(1)),
        grad_loss(n_, T(1)),
        target(n_, 0),
        row_index(n_, 0) {}

  MarginCrossEntropy<T> problem(int64_t threads = 1) const {
    return {logits.data(),
            target.data(),
            row_index.data(),
            rows.data(),
            coefficient.data(),
            n,
            k,
            u,
            stride,
            k,
            threads,
            member};
  }
};

template <class T>
struct Result {
  Guarded<T> loss, dlogits, scale, grad_logits, grad_rows, grad_coefficient;
  explicit Result(const Case<T>& c)
      : loss(c.n),
        dlogits(c.n * c.k),
        scale(c.n),
        grad_logits(c.n * c.k),
        grad_rows(c.u * c.k),
        grad_coefficient(c.n) {}
  bool intact() const {
    return loss.intact() && dlogits.intact() && scale.intact() && grad_logits.intact() &&
           grad_rows.intact() && grad_coefficient.intact();
  }
  bool equals(Result& o) {
    const auto same = [](Guarded<T>& a, Guarded<T>& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
    };
    return same(loss, o.loss) && same(dlogits, o.dlogits) && same(scale, o.scale) &&
           same(grad_logits, o.grad_logits) && same(grad_rows, o.grad_rows) &&
           same(grad_coefficient, o.grad_coefficient);
  }
};

template <class T>
Result<T> run(const Case<T>& c, Isa isa = best_isa(), int64_t threads = 1) {
  Result<T> r(c);
  const auto p = c.problem(threads);
  validate(p);
  cpu::margin_cross_entropy_forward(p, r.loss.data(), r.dlogits.data(), r.scale.data(), isa);
  cpu::margin_cross_entropy_backward(p, c.grad_loss.data(), r.dlogits.data(), r.scale.data(),
                                     r.grad_logits.data(), r.grad_rows.data(),
                                     r.grad_coefficient.data(), isa);
  CHECK(r.intact());
  return r;
}

// The worked example of the published code: W = [[1, 0], [0, 1], [-1, 0]] and l = 2.
template <class T>
void test_published_numbers(Isa isa, double tolerance) {
  Case<T> c(4, 3, 2, LMTFAST_LMTPP);
  c.logits = {T(3), T(1), T(.5), T(.2), T(1), T(.1), T(5), T(0), T(-1), T(2), T(1.9), T(0)};
  c.target = {0, 0, 0, 1};
  c.row_index = {0, 0, 0, 1};
  const T r2 = static_cast<T>(std::sqrt(2.0));
  c.rows = {T(0), r2, T(2), r2, T(0), r2};
  c.coefficient.assign(4, T(2));
  c.grad_loss.assign(4, T(0.25));
  auto r = run(c, isa);
  const double alpha[] = {0.625, 0, 1, 0};
  double mean = 0, gl = 0;
  for (int i = 0; i < 4; ++i) {
    CHECK_NEAR(r.scale[i], alpha[i], tolerance);
    mean += r.loss[i] / 4.0;
    gl += r.grad_coefficient[i];
  }
  CHECK_NEAR(mean, 0.8702611, 1e-6);
  CHECK_NEAR(gl, 0.2610456, 1e-6);
  const double gx[] = {-.160483, .070966, .089517, -.189473, .134706,  .054767,
                       -.049893, .022812, .027081, .122539,  -.139122, .016584};
  for (int i = 0; i < 12; ++i) CHECK_NEAR(r.grad_logits[i], gx[i], 1e-6);
  // d/dW through the norms, w_i - w_t over the norm; the published gradient of W.
  const double w[3][2] = {{1, 0}, {0, 1}, {-1, 0}};
  double gw[3][2] = {};
  for (int u = 0; u < 2; ++u) {
    for (int j = 0; j < 3; ++j) {
      if (j == u) {
        CHECK(r.grad_rows[u * 3 + j] == T(0));
        continue;
      }
      for (int d = 0; d < 2; ++d) {
        const double slope = r.grad_rows[u * 3 + j] * (w[j][d] - w[u][d]) / c.rows[u * 3 + j];
        gw[j][d] += slope;
        gw[u][d] -= slope;
      }
    }
  }
  const double want[3][2] = {{.261046, -.094986}, {-.094986, .094986}, {-.166059, 0}};
  for (int j = 0; j < 3; ++j) {
    for (int d = 0; d < 2; ++d) CHECK_NEAR(gw[j][d], want[j][d], 1e-6);
  }
}

template <class T>
void test_one_class(lmtfast_margin_member member, Isa isa) {
  Case<T> c(1, 1, 1, member);
  c.logits[0] = T(3);
  c.rows[0] = T(5);
  auto r = run(c, isa);
  CHECK(r.loss[0] == T(0));
  CHECK(r.grad_logits[0] == T(0));
  CHECK(r.grad_rows[0] == T(0));
  CHECK(r.grad_coefficient[0] == T(0));
}

template <class T>
void test_empty(lmtfast_margin_member member, Isa isa) {
  Case<T> c(0, 3, 2, member);
  auto r = run(c, isa, 2);
  for (int i = 0; i < 6; ++i) CHECK(r.grad_rows[i] == T(0));
  Case<T> none(0, 3, 0, member);
  run(none, isa, 2);
}

// Zero coefficient: plain cross-entropy to the last bit of y, without NaN, whatever the diagonal of
// the table holds.
template <class T>
void test_zero_coefficient(lmtfast_margin_member member, Isa isa, double tolerance) {
  Case<T> c(2, 3, 1, member);
  c.logits = {T(1), T(1), T(-2), T(0), T(4), T(4)};
  c.target = {0, 0};
  c.rows = {T(9), T(0), T(2)};
  c.coefficient.assign(2, T(0));
  auto r = run(c, isa);
  for (int i = 0; i < 2; ++i) {
    double total = 0, bottom = -kInf;
    int top = 0;
    for (int j = 1; j < 3; ++j) top = c.logits[3 * i + j] > c.logits[3 * i + top] ? j : top;
    for (int j = 0; j < 3; ++j) {
      total += std::exp(static_cast<double>(c.logits[3 * i + j]));
      if (j != top) bottom = std::fmax(bottom, static_cast<double>(c.logits[3 * i + j]));
    }
    if (member == LMTFAST_GLORO) total += std::exp(bottom);
    CHECK_NEAR(r.loss[i], std::log(total) - static_cast<double>(c.logits[3 * i]), tolerance);
    CHECK(std::isfinite(static_cast<double>(r.grad_coefficient[i])));
  }
  for (int j = 0; j < 3; ++j) CHECK(r.grad_rows[j] == T(0));
}

// A tie with a rival scales the addition to nothing; a strict win below the margin ties the
// limiting class.
template <class T>
void test_ties(Isa isa) {
  Case<T> c(3, 2, 1, LMTFAST_LMTPP);
  c.logits = {T(1), T(1), T(0), T(1), T(2), T(1)};
  c.rows = {T(0), T(4)};
  auto r = run(c, isa);
  CHECK(r.scale[0] == T(0));
  CHECK(r.scale[1] == T(0));
  CHECK(r.scale[2] == T(0.25));
  CHECK_NEAR(r.loss[2], std::log(2.0), 1e-6);
}

// GloRo with the wrong class predicted: the extra class may be attained by the target itself.
template <class T>
void test_gloro_target_attains_bottom(Isa isa, double tolerance) {
  Case<T> c(1, 2, 1, LMTFAST_GLORO);
  c.logits = {T(0), T(1)};
  c.target = {0};
  c.rows = {T(3), T(0)};
  auto r = run(c, isa);
  const double total = std::exp(0.0) + std::exp(1.0) + std::exp(3.0);
  CHECK_NEAR(r.loss[0], std::log(total), tolerance);
  CHECK_NEAR(r.grad_logits[0], (1 + std::exp(3.0)) / total - 1, tolerance);
  CHECK_NEAR(r.grad_logits[1], std::exp(1.0) / total, tolerance);
  CHECK_NEAR(r.grad_rows[0], std::exp(3.0) / total, tolerance);
  CHECK_NEAR(r.grad_coefficient[0], 3 * std::exp(3.0) / total, tolerance);
}

template <class T>
void test_non_finite_shows(lmtfast_margin_member member, Isa isa) {
  for (int where = 0; where < 3; ++where) {
    for (int k : {1, 2, 3, 17}) {
      Case<T> c(2, k, 1, member);
      for (auto& z : c.logits) z = T(1);
      for (auto& b : c.rows) b = T(1);
      if (where == 0) c.logits[k - 1] = T(kNan);
      if (where == 1) c.coefficient[0] = T(kNan);
      if (where == 2) c.logits[0] = T(kInf);
      if (where == 1 && k == 1) continue;
      auto r = run(c, isa);
      CHECK(std::isnan(static_cast<double>(r.loss[0])));
      CHECK(std::isfinite(static_cast<double>(r.loss[1])));
    }
  }
}

template <class T>
Case<T> random_case(int64_t n, int64_t k, int64_t u, lmtfast_margin_member member) {
  Case<T> c(n, k, u, member, 3);
  std::mt19937_64 generator(static_cast<uint64_t>(n * 1000003 + k * 1009 + u));
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) c.logits[i * c.stride + j] = T(3 * normal(generator));
    c.target[i] = static_cast<int64_t>(generator() % static_cast<uint64_t>(k));
    c.row_index[i] = static_cast<int64_t>(generator() % static_cast<uint64_t>(u));
    c.coefficient[i] = T(0.3 * std::fabs(normal(generator)));
    c.grad_loss[i] = T(normal(generator));
  }
  for (auto& b : c.rows) b = T(std::fabs(normal(generator)));
  return c;
}

// Bit-equal results for every thread count; every instruction set close to the baseline.
template <class T>
void test_threads_and_isas(lmtfast_margin_member member, double tolerance) {
  const int64_t shapes[][3] = {{1, 2, 1},      {3, 3, 2},    {257, 10, 10},
                               {64, 1000, 61}, {5, 4099, 3}, {300, 257, 1}};
  for (const auto& shape : shapes) {
    const auto c = random_case<T>(shape[0], shape[1], shape[2], member);
    auto baseline = run(c, Isa::kBaseline);
    for (const Isa isa : kAllIsas) {
      if (!isa_supported(isa)) continue;
      auto single = run(c, isa);
      for (const int64_t threads : {2, 3, 7}) {
        auto several = run(c, isa, threads);
        CHECK(single.equals(several));
      }
      for (size_t i = 0; i < single.loss.size(); ++i) {
        CHECK_NEAR(single.loss[i], baseline.loss[i], tolerance * (1 + std::fabs(baseline.loss[i])));
      }
      for (size_t i = 0; i < single.grad_rows.size(); ++i) {
        CHECK_NEAR(single.grad_rows[i], baseline.grad_rows[i], 8 * tolerance);
      }
    }
  }
}

// Bfloat16 logits give what their values give in float, and a gradient rounded to bfloat16.
void test_bfloat16(lmtfast_margin_member member) {
  for (const Isa isa : kAllIsas) {
    if (!isa_supported(isa)) continue;
    for (const int64_t k : {1, 5, 33, 700}) {
      auto c = random_case<float>(13, k, 4, member);
      std::vector<uint16_t> logits(c.logits.size());
      for (size_t i = 0; i < logits.size(); ++i) {
        logits[i] = simd::narrow_bfloat16(c.logits[i]);
        c.logits[i] = simd::widen_bfloat16(logits[i]);
      }
      auto wide = run(c, isa);
      const MarginCrossEntropy<uint16_t> p{logits.data(),
                                           c.target.data(),
                                           c.row_index.data(),
                                           c.rows.data(),
                                           c.coefficient.data(),
                                           c.n,
                                           c.k,
                                           c.u,
                                           c.stride,
                                           c.k,
                                           2,
                                           member};
      validate(p);
      Result<float> r(c);
      Guarded<uint16_t> grad_logits(static_cast<size_t>(c.n * k));
      cpu::margin_cross_entropy_forward(p, r.loss.data(), r.dlogits.data(), r.scale.data(), isa);
      cpu::margin_cross_entropy_backward(p, c.grad_loss.data(), r.dlogits.data(), r.scale.data(),
                                         grad_logits.data(), r.grad_rows.data(),
                                         r.grad_coefficient.data(), isa);
      CHECK(grad_logits.intact());
      for (size_t i = 0; i < grad_logits.size(); ++i) {
        CHECK(grad_logits[i] == simd::narrow_bfloat16(wide.grad_logits[i]));
        r.grad_logits[i] = wide.grad_logits[i];
      }
      CHECK(r.intact());
      CHECK(wide.equals(r));
    }
  }
}

template <class T>
void test_all(double tolerance) {
  for (const Isa isa : kAllIsas) {
    if (!isa_supported(isa)) continue;
    test_published_numbers<T>(isa, tolerance);
    test_ties<T>(isa);
    test_gloro_target_attains_bottom<T>(isa, tolerance);
    for (const auto member : {LMTFAST_LMT, LMTFAST_LMTPP, LMTFAST_EMMA, LMTFAST_GLORO}) {
      test_one_class<T>(member, isa);
      test_empty<T>(member, isa);
      test_zero_coefficient<T>(member, isa, tolerance);
      test_non_finite_shows<T>(member, isa);
    }
  }
  for (const auto member : {LMTFAST_LMT, LMTFAST_LMTPP, LMTFAST_EMMA, LMTFAST_GLORO}) {
    test_threads_and_isas<T>(member, tolerance);
  }
}

}  // namespace

int main() {
  for (const Isa isa : kAllIsas) {
    std::printf("instruction set %d: %s\n", static_cast<int>(isa),
                isa_supported(isa) ? "tested" : "not on this machine");
  }
  test_all<float>(2e-6);
  test_all<double>(1e-13);
  for (const auto member : {LMTFAST_LMT, LMTFAST_LMTPP, LMTFAST_EMMA, LMTFAST_GLORO}) {
    test_bfloat16(member);
  }
  return check::report();
}
