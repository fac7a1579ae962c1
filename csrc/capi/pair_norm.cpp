// SPDX-License-Identifier: MIT
// C ABI -> pair norms on the CPU. Validates once; the kernels below assume valid input.
#include "ops/pair_norm.h"

#include "core/status.h"

namespace {

constexpr const char* kWhere = "pair_norm";

template <class W>
lmtfast::PairNorm<W> typed(const lmtfast_pair_norm& p, int64_t num_threads) {
  return {static_cast<const W*>(p.weight), p.classes, p.k, p.d, p.u, p.weight_stride, num_threads};
}

template <class Body>
void with_problem(const lmtfast_pair_norm* problem, int64_t num_threads, Body&& body) {
  lmtfast::require(problem != nullptr, "a problem", 0, kWhere);
  const auto checked = [&](const auto& p) {
    lmtfast::validate(p);
    body(p);
  };
  switch (problem->dtype) {
    case LMTFAST_FLOAT32:
      return checked(typed<float>(*problem, num_threads));
    case LMTFAST_BFLOAT16:
      return checked(typed<uint16_t>(*problem, num_threads));
    default:
      lmtfast::throw_invalid("dtype 0 (float32) or 2 (bfloat16)", problem->dtype, kWhere);
  }
}

template <class W>
W* typed_buffer(void* buffer, const lmtfast::PairNorm<W>&) {
  return static_cast<W*>(buffer);
}

void require_buffer(const void* pointer, int64_t rows, int64_t columns, const char* name) {
  lmtfast::require(pointer != nullptr || rows == 0 || columns == 0, "a non-null pointer", 0, name);
}

}  // namespace

lmtfast_status lmtfast_pair_norm_forward(const lmtfast_pair_norm* problem, float* norms,
                                         int64_t num_threads) {
  return lmtfast::guarded([&] {
    with_problem(problem, num_threads, [&](const auto& p) {
      require_buffer(norms, p.u, p.k, "norms");
      lmtfast::cpu::pair_norm_forward(p, norms);
    });
  });
}

lmtfast_status lmtfast_pair_norm_vjp(const lmtfast_pair_norm* problem, const float* norms,
                                     const float* grad, void* grad_weight, int64_t num_threads) {
  return lmtfast::guarded([&] {
    with_problem(problem, num_threads, [&](const auto& p) {
      require_buffer(norms, p.u, p.k, "norms");
      require_buffer(grad, p.u, p.k, "grad");
      require_buffer(grad_weight, p.k, p.d, "grad_weight");
      lmtfast::cpu::pair_norm_vjp(p, norms, grad, typed_buffer(grad_weight, p));
    });
  });
}
