// SPDX-License-Identifier: MIT
#include "ops/cpu/separable_kernels.h"

#include <cmath>
#include <utility>

#include "core/buffer.h"
#include "core/simd.h"

namespace lmtfast::cpu {
namespace {

// The vectors of one instruction set as a type, so that templates can choose among them.
#define LMTFAST_UNIT(name, set)                                                            \
  struct name {                                                                            \
    using Vec = simd::set::Vec;                                                            \
    static constexpr int kWidth = simd::set::kWidth;                                       \
    LMTFAST_INLINE static Vec zero() { return simd::set::zero(); }                         \
    LMTFAST_INLINE static Vec broadcast(float x) { return simd::set::broadcast(x); }       \
    LMTFAST_INLINE static Vec load(const float* p) { return simd::set::load(p); }          \
    LMTFAST_INLINE static void store(float* p, Vec x) { simd::set::store(p, x); }          \
    LMTFAST_INLINE static Vec fma(Vec a, Vec b, Vec c) { return simd::set::fma(a, b, c); } \
  };

namespace baseline {
namespace v = simd::baseline;
LMTFAST_UNIT(Eight, baseline)
using Four = Eight;
LMTFAST_UNIT(One, scalar)
using Vec = v::Vec;
#include "ops/cpu/separable_passes.h"
#include "ops/cpu/separable_products.h"
constexpr SeparableKernels kKernels{apply,          pull, outer,   multiply, square, dot,
                                    orthonormalise, turn, rescale, largest,  add,    widen};
}  // namespace baseline

#if LMTFAST_X86_CLONES
LMTFAST_TARGET_BEGIN_AVX2
namespace avx2 {
namespace v = simd::avx2;
LMTFAST_UNIT(Eight, avx2)
LMTFAST_UNIT(Four, baseline)
LMTFAST_UNIT(One, scalar)
using Vec = v::Vec;
#include "ops/cpu/separable_passes.h"
#include "ops/cpu/separable_products.h"
constexpr SeparableKernels kKernels{apply,          pull, outer,   multiply, square, dot,
                                    orthonormalise, turn, rescale, largest,  add,    widen};
}  // namespace avx2
LMTFAST_TARGET_END

LMTFAST_TARGET_BEGIN_AVX512
namespace avx512 {
namespace v = simd::avx512;
LMTFAST_UNIT(Eight, avx2)
LMTFAST_UNIT(Four, baseline)
LMTFAST_UNIT(One, scalar)
using Vec = v::Vec;
#include "ops/cpu/separable_passes.h"
#include "ops/cpu/separable_products.h"
constexpr SeparableKernels kKernels{apply,          pull, outer,   multiply, square, dot,
                                    orthonormalise, turn, rescale, largest,  add,    widen};
}  // namespace avx512
LMTFAST_TARGET_END
#endif

}  // namespace

const SeparableKernels& separable_kernels(Isa isa) {
#if LMTFAST_X86_CLONES
  if (isa == Isa::kAvx512) return avx512::kKernels;
  if (isa == Isa::kAvx2) return avx2::kKernels;
#endif
  (void)isa;
  return baseline::kKernels;
}

}  // namespace lmtfast::cpu
