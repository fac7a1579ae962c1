// SPDX-License-Identifier: MIT
// The entry points of lmtfast/cuda.h in a build without CUDA.
#include "core/status.h"

namespace {

lmtfast_status refuse() {
  return lmtfast::guarded([] {
    throw lmtfast::DeviceError(
        "this build has no CUDA kernels; configure it with -DLMTFAST_CUDA=ON");
  });
}

}  // namespace

lmtfast_status lmtfast_cuda_capability(int64_t, int64_t*) { return refuse(); }

lmtfast_status lmtfast_cuda_margin_cross_entropy_forward(const lmtfast_margin_cross_entropy*, void*,
                                                         void*, void*, void*) {
  return refuse();
}

int64_t lmtfast_cuda_margin_cross_entropy_workspace(int64_t, int64_t) { return 0; }

lmtfast_status lmtfast_cuda_margin_cross_entropy_backward(const lmtfast_margin_cross_entropy*,
                                                          const void*, const void*, const void*,
                                                          void*, void*, void*, int32_t*, void*) {
  return refuse();
}

lmtfast_status lmtfast_cuda_pair_norm_forward(const lmtfast_pair_norm*, void*, void*) {
  return refuse();
}

lmtfast_status lmtfast_cuda_pair_norm_vjp(const lmtfast_pair_norm*, const void*, const void*, void*,
                                          void*, void*) {
  return refuse();
}

lmtfast_status lmtfast_cuda_shared_bytes(int64_t, int64_t*) { return refuse(); }

lmtfast_status lmtfast_cuda_plan(const lmtfast_network*, int64_t, int64_t*, int64_t, int64_t*,
                                 int64_t*) {
  return refuse();
}

lmtfast_status lmtfast_cuda_spectral_step(const int64_t*, const int64_t*, const lmtfast_tensor*,
                                          int64_t, const float*, float*, float*, float*, void*,
                                          void*) {
  return refuse();
}

lmtfast_status lmtfast_cuda_spectral_vjp(const int64_t*, const int64_t*, const lmtfast_tensor*,
                                         int64_t, const float*, const float*, const lmtfast_tensor*,
                                         void*, void*) {
  return refuse();
}

lmtfast_status lmtfast_cuda_compose(const int64_t*, const int64_t*, const float*, float*, float*,
                                    void*, void*) {
  return refuse();
}
