// SPDX-License-Identifier: MIT
#include "ops/cpu/panel.h"

#include <cstring>

#include "core/vector_math.h"

namespace lmtfast::cpu {
namespace {

LMTFAST_INLINE void add_body(const float* share, int64_t blocks, const float* factors, bool first,
                             float* sum) {
  for (int64_t b = 0; b < blocks; ++b) {
    for (int k = 0; k < kPanelColumns; ++k) {
      const int64_t at = b * kPanelBlock + k * kBlock;
      const float factor = factors[k / 2];
      // A panel that was never written may hold anything, so it is not multiplied by zero.
      if (first) {
#pragma omp simd
        for (int i = 0; i < kBlock; ++i) sum[at + i] = factor * share[at + i];
      } else {
#pragma omp simd
        for (int i = 0; i < kBlock; ++i) sum[at + i] += factor * share[at + i];
      }
    }
  }
}

LMTFAST_INLINE void rotate_body(const float* e, int64_t period, bool conjugate, int64_t blocks,
                                float* x) {
  const float sign = conjugate ? -1.0f : 1.0f;
  int64_t turn = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int k = 0; k < kPanelColumns; k += 2) {
      float *xr = x + b * kPanelBlock + k * kBlock, *xi = xr + kBlock;
      const float *er = e + turn * kPanelBlock + k * kBlock, *ei = er + kBlock;
#pragma omp simd
      for (int i = 0; i < kBlock; ++i) {
        const float re = xr[i], im = xi[i], turned = sign * ei[i];
        xr[i] = re * er[i] - im * turned;
        xi[i] = im * er[i] + re * turned;
      }
    }
    turn = turn + 1 == period ? 0 : turn + 1;
  }
}

LMTFAST_INLINE void correlate_body(const float* a, const float* z, int64_t blocks, int64_t period,
                                   float* products) {
  for (int64_t i = 0; i < period * kPanelBlock; ++i) products[i] = 0.0f;
  int64_t turn = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int k = 0; k < kPanelColumns; k += 2) {
      const float *ar = a + b * kPanelBlock + k * kBlock, *ai = ar + kBlock;
      const float *zr = z + b * kPanelBlock + k * kBlock, *zi = zr + kBlock;
      float *pr = products + turn * kPanelBlock + k * kBlock, *pi = pr + kBlock;
#pragma omp simd
      for (int i = 0; i < kBlock; ++i) {
        pr[i] += ar[i] * zr[i] + ai[i] * zi[i];
        pi[i] += ar[i] * zi[i] - ai[i] * zr[i];
      }
    }
    turn = turn + 1 == period ? 0 : turn + 1;
  }
}

// Inlined into one set of functions per instruction set.
#define LMTFAST_PANEL(name, attributes)                                                            \
  attributes void add_##name(const float* share, int64_t blocks, const float* factors, bool first, \
                             float* sum) {                                                         \
    add_body(share, blocks, factors, first, sum);                                                  \
  }                                                                                                \
  attributes void rotate_##name(const float* e, int64_t period, bool conjugate, int64_t blocks,    \
                                float* x) {                                                        \
    rotate_body(e, period, conjugate, blocks, x);                                                  \
  }                                                                                                \
  attributes void correlate_##name(const float* a, const float* z, int64_t blocks, int64_t period, \
                                   float* products) {                                              \
    correlate_body(a, z, blocks, period, products);                                                \
  }                                                                                                \
  constexpr PanelKernels k##name{add_##name, rotate_##name, correlate_##name};

LMTFAST_PANEL(baseline, )
#if LMTFAST_X86_CLONES
LMTFAST_PANEL(avx2, __attribute__((target("avx2,fma"))))
LMTFAST_PANEL(avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma"))))
#endif

}  // namespace

const PanelKernels& panel_kernels(Isa isa) {
#if LMTFAST_X86_CLONES
  if (isa == Isa::kAvx512) return kavx512;
  if (isa == Isa::kAvx2) return kavx2;
#endif
  (void)isa;
  return kbaseline;
}

void write_column(const float* entries, int64_t blocks, int k, float* panel) {
  for (int64_t b = 0; b < blocks; ++b) {
    std::memcpy(panel + b * kPanelBlock + k * kBlock, entries + b * kBlock, kBlock * sizeof(float));
  }
}

void read_column(const float* panel, int64_t blocks, int k, float* entries) {
  for (int64_t b = 0; b < blocks; ++b) {
    std::memcpy(entries + b * kBlock, panel + b * kPanelBlock + k * kBlock, kBlock * sizeof(float));
  }
}

}  // namespace lmtfast::cpu
