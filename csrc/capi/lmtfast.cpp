// SPDX-License-Identifier: MIT
// C ABI -> ops. Validates once; the kernels below assume valid input.
#include "lmtfast/lmtfast.h"

#include "core/dispatch.h"
#include "core/status.h"
#include "ops/margin_cross_entropy.h"

namespace {

constexpr const char* kWhere = "margin_cross_entropy";

template <class T>
lmtfast::MarginCrossEntropy<T> typed(const lmtfast_margin_cross_entropy& p) {
  return {static_cast<const T*>(p.logits),
          p.target,
          p.row_index,
          static_cast<const lmtfast::Real<T>*>(p.rows),
          static_cast<const lmtfast::Real<T>*>(p.coefficient),
          p.n,
          p.k,
          p.u,
          p.logits_stride,
          p.rows_stride,
          p.num_threads,
          static_cast<lmtfast_margin_member>(p.member)};
}

void require_problem(const lmtfast_margin_cross_entropy* problem) {
  lmtfast::require(problem != nullptr, "a problem", 0, kWhere);
  lmtfast::require(problem->member >= LMTFAST_LMT && problem->member <= LMTFAST_GLORO,
                   "member in [0, 3]", problem->member, kWhere);
}

void require_buffer(const void* pointer, int64_t extent, const char* name) {
  lmtfast::require(pointer != nullptr || extent == 0, "a non-null pointer", 0, name);
}

}  // namespace

lmtfast_status lmtfast_margin_cross_entropy_forward(const lmtfast_margin_cross_entropy* problem,
                                                    void* loss, void* dlogits, void* scale) {
  return lmtfast::guarded([&] {
    require_problem(problem);
    lmtfast::dispatch_dtype(problem->dtype, kWhere, [&](auto zero) {
      using T = decltype(zero);
      using R = lmtfast::Real<T>;
      const auto p = typed<T>(*problem);
      lmtfast::validate(p);
      require_buffer(loss, p.n, "loss");
      require_buffer(dlogits, p.n, "dlogits");
      require_buffer(scale, p.n, "scale");
      lmtfast::cpu::margin_cross_entropy_forward(p, static_cast<R*>(loss), static_cast<R*>(dlogits),
                                                 static_cast<R*>(scale));
    });
  });
}

lmtfast_status lmtfast_margin_cross_entropy_backward(const lmtfast_margin_cross_entropy* problem,
                                                     const void* grad_loss, const void* dlogits,
                                                     const void* scale, void* grad_logits,
                                                     void* grad_rows, void* grad_coefficient) {
  return lmtfast::guarded([&] {
    require_problem(problem);
    lmtfast::dispatch_dtype(problem->dtype, kWhere, [&](auto zero) {
      using T = decltype(zero);
      using R = lmtfast::Real<T>;
      const auto p = typed<T>(*problem);
      lmtfast::validate(p);
      require_buffer(grad_loss, p.n, "grad_loss");
      require_buffer(dlogits, p.n, "dlogits");
      require_buffer(scale, p.n, "scale");
      require_buffer(grad_logits, p.n, "grad_logits");
      require_buffer(grad_rows, p.u, "grad_rows");
      require_buffer(grad_coefficient, p.n, "grad_coefficient");
      lmtfast::cpu::margin_cross_entropy_backward(
          p, static_cast<const R*>(grad_loss), static_cast<const R*>(dlogits),
          static_cast<const R*>(scale), static_cast<T*>(grad_logits), static_cast<R*>(grad_rows),
          static_cast<R*>(grad_coefficient));
    });
  });
}
