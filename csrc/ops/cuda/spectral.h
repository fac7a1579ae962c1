// SPDX-License-Identifier: MIT
// Spectral norms of a network on a CUDA device. Layouts of iterates and saved vectors:
// ops/spectral.h. A step is
//   prepare, pass, finish            operators by symbol, matrices: the weights are read once;
//                                    separable: twice
//   prepare, A v, A^T u              convolutions by power iteration
// one launch each for all operators of the network, and a gradient one launch, scales included.
// What the separable engine saves of the image is the image as its gradient reads it: mixed by the
// overlap of the shifted patterns, over sigma.
#pragma once

#include <cstdint>

#include "core/device_types.h"
#include "ops/cuda/plan.h"

namespace lmtfast::cuda {

struct View;

void launch_prepare(const View& view, uint64_t* table, const uint64_t* tensors, unsigned blocks,
                    Stream stream);
void launch_pass(const View& view, unsigned blocks, int64_t shared_bytes, Stream stream);
void launch_pass_finish(const View& view, unsigned records, unsigned blocks, int64_t shared_bytes,
                        Stream stream);
void launch_stencil(const View& view, bool adjoint, bool second, unsigned blocks, Stream stream);
void launch_gradient(const View& view, const uint64_t* tensors, const uint64_t* grads,
                     unsigned blocks, Stream stream);

// A plan as a call gets it: the same table on the host and on the device.
struct Plan {
  const int64_t* host;
  const int64_t* device;
};

// Arguments as lmtfast_spectral_step's, buffers on the device.
void spectral_step(const Plan& plan, const lmtfast_tensor* tensors, int64_t n_tensors,
                   const float* state, float* new_state, float* sigmas, float* saved,
                   void* workspace, Stream stream);

void spectral_vjp(const Plan& plan, const lmtfast_tensor* tensors, int64_t n_tensors,
                  const float* saved, const float* grad_sigmas, const lmtfast_tensor* grads,
                  void* workspace, Stream stream);

// One launch of one block: a few dozen dependent operations.
void compose(const Plan& plan, const float* sigmas, float* values, float* jacobian, void* workspace,
             Stream stream);

}  // namespace lmtfast::cuda
