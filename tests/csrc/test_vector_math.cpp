// SPDX-License-Identifier: MIT
// exp_nonpositive against long double: the error documented in core/vector_math.h, and its special
// values.
#include <limits>

#include "check.h"
#include "core/vector_math.h"

namespace {

template <class T>
double ulps(T got, T x) {
  const long double want = std::exp(static_cast<long double>(x));
  int exponent;
  std::frexp(static_cast<double>(want), &exponent);
  const long double ulp = std::ldexp(1.0L, exponent - std::numeric_limits<T>::digits);
  return static_cast<double>(std::fabs(static_cast<long double>(got) - want) / ulp);
}

template <bool kFma, class T>
double worst(T lowest, int points) {
  double result = 0;
  for (int i = 0; i <= points; ++i) {
    const T x = lowest * (static_cast<T>(i) / static_cast<T>(points));
    result = std::fmax(result, ulps(lmtfast::exp_nonpositive<kFma>(x), x));
  }
  return result;
}

template <bool kFma, class T>
void test_type(T lowest, double bound, int points) {
  using lmtfast::exp_nonpositive;
  const double error = worst<kFma>(lowest, points);
  const double near_zero = worst<kFma>(T(-1), points);
  std::printf("fma %d, %zu bytes: %.3f ulp, %.3f ulp on [-1, 0]\n", kFma, sizeof(T), error,
              near_zero);
  CHECK(error < bound);
  CHECK(near_zero < bound);
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  CHECK(exp_nonpositive<kFma>(T(0)) == T(1));
  CHECK(exp_nonpositive<kFma>(-T(0)) == T(1));
  CHECK(exp_nonpositive<kFma>(-kInfinity) == T(0));
  CHECK(exp_nonpositive<kFma>(std::numeric_limits<T>::lowest()) == T(0));
  CHECK(exp_nonpositive<kFma>(lowest * T(1.01)) == T(0));
  CHECK(std::isnan(exp_nonpositive<kFma>(std::numeric_limits<T>::quiet_NaN())));
}

}  // namespace

int main(int argc, char**) {
  // Any argument: the ten million points of the documented figure.
  const int points = argc > 1 ? 10000000 : 200000;
  test_type<true>(-87.33f, 1.1, points);
  test_type<true>(-708.3, 1.1, points);
  test_type<false>(-87.33f, 1.1, points);
  test_type<false>(-708.3, 1.1, points);
  return check::report();
}
