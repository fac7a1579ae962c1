// SPDX-License-Identifier: MIT
#include "ops/power_vectors.h"

#include <algorithm>
#include <cmath>

#include "core/buffer.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/status.h"

namespace lmtfast {

void validate(const PowerVectors& p) {
  const auto size = [](int64_t n, const char* name) { require(n >= 0, "a size >= 0", n, name); };
  size(p.groups, "groups");
  size(p.rows, "rows");
  size(p.channels, "channels");
  size(p.taps, "taps");
  size(p.frequencies, "frequencies");
  size(p.steps, "steps");
  size(p.threads, "num_threads");
  require(p.phases >= 1, "at least one phase", p.phases, "phases");
  for (int64_t t = 0; t < p.taps; ++t) {
    require(p.phase[t] >= 0 && p.phase[t] < p.phases, "a phase below phases", p.phase[t], "phase");
  }
}

namespace cpu {
namespace {

// Floats of a symbol that is kept; a larger one is built afresh in every pass over its rows, which
// costs arithmetic in place of memory.
constexpr int64_t kHeld = 1 << 22;
// Multiply-adds that pay for waking a thread.
constexpr int64_t kWorkPerThread = 1 << 18;

struct Kernels {
  int64_t lanes;
  void (*run)(const PowerVectors&, int64_t group, int64_t first, int64_t count, float* held,
              float* row, float* x, float* back, float* terms);
};

namespace baseline {
namespace v = simd::baseline;
#include "ops/cpu/power_kernels.h"
constexpr Kernels kKernels{kWidth, run};
}  // namespace baseline

#if LMTFAST_X86_CLONES
LMTFAST_TARGET_BEGIN_AVX2
namespace avx2 {
namespace v = simd::avx2;
#include "ops/cpu/power_kernels.h"
constexpr Kernels kKernels{kWidth, run};
}  // namespace avx2
LMTFAST_TARGET_END

LMTFAST_TARGET_BEGIN_AVX512
namespace avx512 {
namespace v = simd::avx512;
#include "ops/cpu/power_kernels.h"
constexpr Kernels kKernels{kWidth, run};
}  // namespace avx512
LMTFAST_TARGET_END
#endif

const Kernels& kernels(Isa isa) {
#if LMTFAST_X86_CLONES
  if (isa == Isa::kAvx512) return avx512::kKernels;
  if (isa == Isa::kAvx2) return avx2::kKernels;
#endif
  (void)isa;
  return baseline::kKernels;
}

}  // namespace

void power_vectors(const PowerVectors& p) {
  const Kernels& k = kernels(best_isa());
  const int64_t per_group = (p.frequencies + k.lanes - 1) / k.lanes;
  const int64_t row = 2 * p.width() * k.lanes;
  const bool held = p.rows * row <= kHeld;
  const int64_t work = p.groups * per_group * k.lanes * p.rows * p.width() * (8 * p.steps + 1);
  const int64_t threads = choose_threads(p.threads, work, kWorkPerThread);
  parallel_for(p.groups * per_group, threads, [&](int64_t i) {
    Buffer<float> symbol(held ? p.rows * row : row), x(row), back(row), terms(2 * p.taps * k.lanes);
    const int64_t first = i % per_group * k.lanes;
    k.run(p, i / per_group, first, std::min(k.lanes, p.frequencies - first),
          held ? symbol.data() : nullptr, symbol.data(), x.data(), back.data(), terms.data());
  });
}

}  // namespace cpu
}  // namespace lmtfast
