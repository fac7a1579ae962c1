/* SPDX-License-Identifier: MIT */
/* C ABI of lmtfast on NVIDIA GPUs, included by lmtfast.h.
 *
 * Rules beside those of lmtfast.h:
 *  - pointers to buffers are device pointers of the calling thread's current device, unless a
 *    comment says host; the structs themselves are read on the host, during the call;
 *  - `stream` is a cudaStream_t, NULL the default stream. A call enqueues kernels and returns: it
 *    never waits, allocates or copies, so it may be captured in a CUDA graph;
 *  - what the host can see is validated before the first launch. Targets and indices in device
 *    memory are not: one out of range gives NaN, never an access out of bounds;
 *  - results do not depend on the order in which blocks run: no atomics on floats;
 *  - a build without CUDA has these functions too: they return LMTFAST_DEVICE_ERROR and say so.
 */
#ifndef LMTFAST_CUDA_H_
#define LMTFAST_CUDA_H_

#include "lmtfast/lmtfast.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Compute capability, major times ten plus minor, of a device; LMTFAST_DEVICE_ERROR where there is
 * none, or no driver, or no CUDA in this build. */
LMTFAST_API lmtfast_status lmtfast_cuda_capability(int64_t device, int64_t* capability);

/* Shared memory in bytes that a block on a device may ask for. */
LMTFAST_API lmtfast_status lmtfast_cuda_shared_bytes(int64_t device, int64_t* bytes);

/* As lmtfast_margin_cross_entropy_forward, also for bfloat16 logits: rows, coefficient, loss,
 * dlogits and scale are then float32. num_threads is ignored. */
LMTFAST_API lmtfast_status
lmtfast_cuda_margin_cross_entropy_forward(const lmtfast_margin_cross_entropy* problem, void* loss,
                                          void* dlogits, void* scale, void* stream);

/* Entries of the int32 workspace that the backward call needs. */
LMTFAST_API int64_t lmtfast_cuda_margin_cross_entropy_workspace(int64_t n, int64_t u);

/* As lmtfast_margin_cross_entropy_backward; grad_logits is of the logits' dtype, everything else of
 * the dtype of the loss, and grad_logits must not be dlogits. */
LMTFAST_API lmtfast_status lmtfast_cuda_margin_cross_entropy_backward(
    const lmtfast_margin_cross_entropy* problem, const void* grad_loss, const void* dlogits,
    const void* scale, void* grad_logits, void* grad_rows, void* grad_coefficient,
    int32_t* workspace, void* stream);

/* Writes norms (u, k): the distance of row classes[u] from row j, exactly 0 where they are one. */
LMTFAST_API lmtfast_status lmtfast_cuda_pair_norm_forward(const lmtfast_pair_norm* problem,
                                                          void* norms, void* stream);

/* From norms and their gradient, both (u, k), writes grad_weight (k, d), of the head's dtype. A pair
 * at distance 0 contributes 0. `own` is a workspace of (u, d), of the norms' dtype. */
LMTFAST_API lmtfast_status lmtfast_cuda_pair_norm_vjp(const lmtfast_pair_norm* problem,
                                                      const void* norms, const void* grad,
                                                      void* own, void* grad_weight, void* stream);

/* The plan of a network: which block of which launch does what, on a device whose blocks may have
 * shared_bytes of shared memory. Made once, on the host, and copied by the caller to the device;
 * calls take both copies. With table NULL only the sizes are written: int64 entries of the table, and
 * bytes of the workspace that every call needs (its content does not matter and nothing in it is
 * kept; 16-byte aligned). */
LMTFAST_API lmtfast_status lmtfast_cuda_plan(const lmtfast_network* network, int64_t shared_bytes,
                                             int64_t* table, int64_t capacity, int64_t* table_size,
                                             int64_t* workspace_bytes);

/* As lmtfast_spectral_step; the array of tensors is read on the host. */
LMTFAST_API lmtfast_status lmtfast_cuda_spectral_step(const int64_t* plan,
                                                      const int64_t* device_plan,
                                                      const lmtfast_tensor* tensors,
                                                      int64_t n_tensors, const float* state,
                                                      float* new_state, float* sigmas, float* saved,
                                                      void* workspace, void* stream);

/* As lmtfast_spectral_vjp; the arrays of tensors and gradients are read on the host. */
LMTFAST_API lmtfast_status lmtfast_cuda_spectral_vjp(
    const int64_t* plan, const int64_t* device_plan, const lmtfast_tensor* tensors,
    int64_t n_tensors, const float* saved, const float* grad_sigmas, const lmtfast_tensor* grads,
    void* workspace, void* stream);

/* As lmtfast_compose. */
LMTFAST_API lmtfast_status lmtfast_cuda_compose(const int64_t* plan, const int64_t* device_plan,
                                                const float* sigmas, float* values, float* jacobian,
                                                void* workspace, void* stream);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* LMTFAST_CUDA_H_ */
