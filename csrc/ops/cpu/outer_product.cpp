// SPDX-License-Identifier: MIT
#include "ops/cpu/outer_product.h"

#include "core/vector_math.h"

#if LMTFAST_X86_CLONES
#include <immintrin.h>
#endif

namespace lmtfast::cpu {
namespace {

LMTFAST_INLINE void store_body(float a, const float* x, float b, const float* y, int64_t n,
                               float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = a * x[i] + b * y[i];
}

LMTFAST_INLINE void add_body(float a, const float* x, float b, const float* y, int64_t n,
                             float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += a * x[i] + b * y[i];
}

// Entries before the first multiple of `bytes`.
LMTFAST_INLINE int64_t until_aligned(const float* out, int64_t bytes, int64_t n) {
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % bytes);
  const int64_t entries = (bytes - past) % bytes / static_cast<int64_t>(sizeof(float));
  return entries < n ? entries : n;
}

void store_baseline(float a, const float* x, float b, const float* y, int64_t n, float* out) {
  store_body(a, x, b, y, n, out);
}
void add_baseline(float a, const float* x, float b, const float* y, int64_t n, float* out) {
  add_body(a, x, b, y, n, out);
}
constexpr OuterKernels kBaseline{store_baseline, add_baseline, store_baseline};

#if LMTFAST_X86_CLONES
// Products and sums round one by one, here as there: streaming changes no bit.
#define LMTFAST_OUTER(name, attributes, lanes, prefix)                                       \
  attributes void store_##name(float a, const float* x, float b, const float* y, int64_t n,  \
                               float* out) {                                                 \
    store_body(a, x, b, y, n, out);                                                          \
  }                                                                                          \
  attributes void add_##name(float a, const float* x, float b, const float* y, int64_t n,    \
                             float* out) {                                                   \
    add_body(a, x, b, y, n, out);                                                            \
  }                                                                                          \
  attributes void stream_##name(float a, const float* x, float b, const float* y, int64_t n, \
                                float* out) {                                                \
    int64_t i = until_aligned(out, 4 * lanes, n);                                            \
    store_body(a, x, b, y, i, out);                                                          \
    for (; i + lanes <= n; i += lanes) {                                                     \
      prefix##_stream_ps(                                                                    \
          out + i,                                                                           \
          prefix##_add_ps(prefix##_mul_ps(prefix##_set1_ps(a), prefix##_loadu_ps(x + i)),    \
                          prefix##_mul_ps(prefix##_set1_ps(b), prefix##_loadu_ps(y + i))));  \
    }                                                                                        \
    store_body(a, x + i, b, y + i, n - i, out + i);                                          \
  }                                                                                          \
  constexpr OuterKernels k##name{store_##name, add_##name, stream_##name};

LMTFAST_OUTER(avx2, __attribute__((target("avx2,fma"))), 8, _mm256)
LMTFAST_OUTER(avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma"))), 16, _mm512)
#endif

}  // namespace

const OuterKernels& outer_kernels(Isa isa) {
#if LMTFAST_X86_CLONES
  if (isa == Isa::kAvx512) return kavx512;
  if (isa == Isa::kAvx2) return kavx2;
#endif
  (void)isa;
  return kBaseline;
}

void end_streaming() {
#if LMTFAST_X86_CLONES
  _mm_sfence();
#endif
}

}  // namespace lmtfast::cpu
