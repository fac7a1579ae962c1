// SPDX-License-Identifier: MIT
// From runtime values to compile-time choices: element type and instruction set.
#pragma once

#include "core/status.h"

namespace lmtfast {

// Calls body(T{}) with T the element type of `dtype`, uint16_t for bfloat16.
template <class Body>
void dispatch_dtype(int64_t dtype, const char* where, Body&& body) {
  switch (dtype) {
    case LMTFAST_FLOAT32:
      return body(float{});
    case LMTFAST_FLOAT64:
      return body(double{});
    case LMTFAST_BFLOAT16:
      return body(uint16_t{});
    default:
      throw_invalid("dtype 0 (float32), 1 (float64) or 2 (bfloat16)", dtype, where);
  }
}

// Instruction sets a kernel is compiled for. Baseline always runs; the order is the order of
// preference.
enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr Isa kAllIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512};

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LMTFAST_X86_CLONES 1
inline bool isa_supported(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq") && isa_supported(Isa::kAvx2);
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default:
      return true;
  }
}
#else
#define LMTFAST_X86_CLONES 0
inline bool isa_supported(Isa isa) { return isa == Isa::kBaseline; }
#endif

inline Isa best_isa() {
  static const Isa best = isa_supported(Isa::kAvx512) ? Isa::kAvx512
                          : isa_supported(Isa::kAvx2) ? Isa::kAvx2
                                                      : Isa::kBaseline;
  return best;
}

}  // namespace lmtfast
