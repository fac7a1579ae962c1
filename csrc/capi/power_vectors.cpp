// SPDX-License-Identifier: MIT
// C ABI -> power steps at many frequencies. Validates once; the kernels below assume valid input.
#include "ops/power_vectors.h"

#include "core/status.h"

lmtfast_status lmtfast_power_vectors(const lmtfast_power_problem* problem, const float* acting,
                                     const int64_t* phase, const float* terms, const float* start,
                                     float* norms, float* vectors, int64_t num_threads) {
  return lmtfast::guarded([&] {
    lmtfast::require(problem != nullptr, "a problem", 0, "power_vectors");
    for (const void* pointer :
         {static_cast<const void*>(acting), static_cast<const void*>(phase),
          static_cast<const void*>(terms), static_cast<const void*>(start),
          static_cast<const void*>(norms), static_cast<const void*>(vectors)}) {
      lmtfast::require(pointer != nullptr, "a non-null pointer", 0, "power_vectors");
    }
    const lmtfast_power_problem& p = *problem;
    const lmtfast::PowerVectors checked{acting,   phase,         terms,   start,      norms,
                                        vectors,  p.groups,      p.rows,  p.channels, p.taps,
                                        p.phases, p.frequencies, p.steps, num_threads};
    lmtfast::validate(checked);
    lmtfast::cpu::power_vectors(checked);
  });
}
