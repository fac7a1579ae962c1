// SPDX-License-Identifier: MIT
// C ABI -> CUDA ops. Validates what the host can see, once; the kernels assume valid input.
#include <algorithm>
#include <limits>

#include "core/device_types.h"
#include "core/status.h"
#include "ops/cuda/device.h"
#include "ops/cuda/margin_cross_entropy.h"
#include "ops/cuda/pair_norm.h"

namespace {

using lmtfast::require;
using lmtfast::cuda::Compute;

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max() - 1;

void require_buffer(const void* pointer, int64_t extent, const char* name) {
  require(pointer != nullptr || extent == 0, "a non-null pointer", 0, name);
}

template <class Body>
void dispatch(int64_t dtype, const char* where, Body&& body) {
  switch (dtype) {
    case LMTFAST_FLOAT32:
      return body(float{});
    case LMTFAST_FLOAT64:
      return body(double{});
    case LMTFAST_BFLOAT16:
      return body(lmtfast::cuda::bfloat16{});
    default:
      lmtfast::throw_invalid("dtype 0 (float32), 1 (float64) or 2 (bfloat16)", dtype, where);
  }
}

void require_margin(const lmtfast_margin_cross_entropy* p) {
  require(p != nullptr, "a problem", 0, "margin_cross_entropy");
  require(p->member >= LMTFAST_LMT && p->member <= LMTFAST_GLORO, "member in [0, 3]", p->member,
          "member");
  require(p->n >= 0 && p->n <= kMaxIndex, "0 <= n < 2^31 - 1", p->n, "n");
  require(p->k >= 1 && p->k <= kMaxIndex, "1 <= k < 2^31 - 1", p->k, "k");
  require(p->u >= 0 && p->u <= kMaxIndex, "0 <= u < 2^31 - 1", p->u, "u");
  require(p->n <= 1 || p->logits_stride >= p->k, "logits_stride >= k", p->logits_stride,
          "logits_stride");
  require(p->u <= 1 || p->rows_stride >= p->k, "rows_stride >= k", p->rows_stride, "rows_stride");
  require(p->n == 0 || (p->logits && p->target && p->row_index && p->coefficient),
          "non-null inputs", 0, "inputs");
  require_buffer(p->rows, p->n == 0 ? 0 : p->u, "rows");
}

template <class T>
lmtfast::cuda::MarginProblem<T> typed(const lmtfast_margin_cross_entropy& p) {
  using C = Compute<T>;
  return {static_cast<const T*>(p.logits),
          p.target,
          p.row_index,
          static_cast<const C*>(p.rows),
          static_cast<const C*>(p.coefficient),
          p.n,
          p.k,
          p.u,
          p.logits_stride,
          p.rows_stride,
          static_cast<lmtfast_margin_member>(p.member)};
}

void require_pair_norm(const lmtfast_pair_norm* p) {
  require(p != nullptr, "a problem", 0, "pair_norm");
  require(p->k >= 0 && p->k <= kMaxIndex, "0 <= k < 2^31 - 1", p->k, "k");
  require(p->d >= 0 && p->d <= kMaxIndex, "0 <= d < 2^31 - 1", p->d, "d");
  require(p->u >= 0 && p->u <= kMaxIndex, "0 <= u < 2^31 - 1", p->u, "u");
  require(p->classes != nullptr || p->u == p->k || p->u == 0, "u = k, or classes", p->u, "u");
  require(p->k <= 1 || p->weight_stride >= p->d, "weight_stride >= d", p->weight_stride,
          "weight_stride");
  require_buffer(p->weight, p->k * p->d, "weight");
}

template <class T>
lmtfast::cuda::PairNorm<T> typed(const lmtfast_pair_norm& p) {
  return {static_cast<const T*>(p.weight), p.classes, p.k, p.d, p.u, p.weight_stride};
}

}  // namespace

lmtfast_status lmtfast_cuda_capability(int64_t device, int64_t* capability) {
  return lmtfast::guarded([&] {
    require_buffer(capability, 1, "capability");
    *capability = lmtfast::cuda::capability(device);
  });
}

lmtfast_status lmtfast_cuda_shared_bytes(int64_t device, int64_t* bytes) {
  return lmtfast::guarded([&] {
    require_buffer(bytes, 1, "bytes");
    *bytes = lmtfast::cuda::shared_bytes(device);
  });
}

lmtfast_status lmtfast_cuda_margin_cross_entropy_forward(
    const lmtfast_margin_cross_entropy* problem, void* loss, void* dlogits, void* scale,
    void* stream) {
  return lmtfast::guarded([&] {
    require_margin(problem);
    dispatch(problem->dtype, "dtype", [&](auto zero) {
      using T = decltype(zero);
      using C = Compute<T>;
      require_buffer(loss, problem->n, "loss");
      require_buffer(dlogits, problem->n, "dlogits");
      require_buffer(scale, problem->n, "scale");
      lmtfast::cuda::margin_forward(typed<T>(*problem), static_cast<C*>(loss),
                                    static_cast<C*>(dlogits), static_cast<C*>(scale), stream);
    });
  });
}

int64_t lmtfast_cuda_margin_cross_entropy_workspace(int64_t n, int64_t u) {
  return lmtfast::cuda::margin_workspace(std::max<int64_t>(n, 0), std::max<int64_t>(u, 0));
}

lmtfast_status lmtfast_cuda_margin_cross_entropy_backward(
    const lmtfast_margin_cross_entropy* problem, const void* grad_loss, const void* dlogits,
    const void* scale, void* grad_logits, void* grad_rows, void* grad_coefficient,
    int32_t* workspace, void* stream) {
  return lmtfast::guarded([&] {
    require_margin(problem);
    dispatch(problem->dtype, "dtype", [&](auto zero) {
      using T = decltype(zero);
      using C = Compute<T>;
      require_buffer(grad_loss, problem->n, "grad_loss");
      require_buffer(dlogits, problem->n, "dlogits");
      require_buffer(scale, problem->n, "scale");
      require_buffer(grad_logits, problem->n, "grad_logits");
      require_buffer(grad_rows, problem->u, "grad_rows");
      require_buffer(grad_coefficient, problem->n, "grad_coefficient");
      require_buffer(workspace, 1, "workspace");
      // The second launch still reads dlogits.
      require(problem->n == 0 || grad_logits != dlogits, "a buffer other than dlogits", 0,
              "grad_logits");
      lmtfast::cuda::margin_backward(typed<T>(*problem), static_cast<const C*>(grad_loss),
                                     static_cast<const C*>(dlogits), static_cast<const C*>(scale),
                                     static_cast<T*>(grad_logits), static_cast<C*>(grad_rows),
                                     static_cast<C*>(grad_coefficient), workspace, stream);
    });
  });
}

lmtfast_status lmtfast_cuda_pair_norm_forward(const lmtfast_pair_norm* problem, void* norms,
                                              void* stream) {
  return lmtfast::guarded([&] {
    require_pair_norm(problem);
    require_buffer(norms, problem->u * problem->k, "norms");
    dispatch(problem->dtype, "dtype", [&](auto zero) {
      using T = decltype(zero);
      lmtfast::cuda::pair_norm_forward(typed<T>(*problem), static_cast<Compute<T>*>(norms), stream);
    });
  });
}

lmtfast_status lmtfast_cuda_pair_norm_vjp(const lmtfast_pair_norm* problem, const void* norms,
                                          const void* grad, void* own, void* grad_weight,
                                          void* stream) {
  return lmtfast::guarded([&] {
    require_pair_norm(problem);
    require_buffer(norms, problem->u * problem->k, "norms");
    require_buffer(grad, problem->u * problem->k, "grad");
    require_buffer(own, problem->u * problem->d, "own");
    require_buffer(grad_weight, problem->k * problem->d, "grad_weight");
    dispatch(problem->dtype, "dtype", [&](auto zero) {
      using T = decltype(zero);
      using C = Compute<T>;
      lmtfast::cuda::pair_norm_vjp(typed<T>(*problem), static_cast<const C*>(norms),
                                   static_cast<const C*>(grad), static_cast<C*>(own),
                                   static_cast<T*>(grad_weight), stream);
    });
  });
}
