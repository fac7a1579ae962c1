// SPDX-License-Identifier: MIT
// A test header of thirty lines: CHECK counts failures and says where, report() is the exit status.
#pragma once

#include <cmath>
#include <cstdio>
#include <vector>

namespace check {

inline int failures = 0;
inline int checks = 0;

inline void that(bool ok, const char* what, const char* file, int line) {
  ++checks;
  if (ok) return;
  ++failures;
  std::printf("%s:%d: failed: %s\n", file, line, what);
}

inline void near(double got, double want, double tolerance, const char* what, const char* file,
                 int line) {
  ++checks;
  if (std::fabs(got - want) <= tolerance) return;
  ++failures;
  std::printf("%s:%d: failed: %s = %.9g, want %.9g within %g\n", file, line, what, got, want,
              tolerance);
}

inline int report() {
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(condition) check::that((condition), #condition, __FILE__, __LINE__)
#define CHECK_NEAR(got, want, tolerance) \
  check::near((got), (want), (tolerance), #got, __FILE__, __LINE__)
