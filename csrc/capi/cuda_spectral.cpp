// SPDX-License-Identifier: MIT
// C ABI -> spectral norms on a CUDA device. Validates what the host can see, once.
#include <algorithm>

#include "ops/cuda/spectral.h"

namespace {

using lmtfast::require;

void require_buffer(const void* pointer, int64_t extent, const char* name) {
  require(pointer != nullptr || extent == 0, "a non-null pointer", 0, name);
}

void require_aligned(const void* pointer, const char* name) {
  require(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, "a 16-byte aligned pointer",
          static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer) % 16), name);
}

// Checks the plan, its copy and the tensors; returns the plan's header.
const lmtfast::cuda::PlanHeader& require_call(const int64_t* plan, const int64_t* device_plan,
                                              const lmtfast_tensor* tensors, int64_t n_tensors,
                                              const void* workspace) {
  const auto& header = lmtfast::cuda::header_of(plan);
  require(device_plan != nullptr, "a plan on the device", 0, "device_plan");
  lmtfast::validate(lmtfast::cuda::network_of(plan), tensors, n_tensors);
  require_buffer(workspace, 1, "workspace");
  require_aligned(device_plan, "device_plan");
  require_aligned(workspace, "workspace");
  return header;
}

void require_grads(const lmtfast_tensor* tensors, const lmtfast_tensor* grads, int64_t n) {
  require(grads != nullptr || n == 0, "a non-null pointer", 0, "grads");
  for (int64_t i = 0; i < n; ++i) {
    if (grads[i].data == nullptr) continue;
    require(grads[i].dtype == LMTFAST_FLOAT32, "dtype float32", grads[i].dtype, "grads");
    require(grads[i].size == tensors[i].size, "the size of the tensor", grads[i].size, "grads");
    require(grads[i].tap_major == tensors[i].tap_major, "the layout of the tensor",
            grads[i].tap_major, "grads");
  }
}

}  // namespace

lmtfast_status lmtfast_cuda_plan(const lmtfast_network* network, int64_t shared_bytes,
                                 int64_t* table, int64_t capacity, int64_t* table_size,
                                 int64_t* workspace_bytes) {
  return lmtfast::guarded([&] {
    require(network != nullptr, "a network", 0, "network");
    require_buffer(table_size, 1, "table_size");
    require_buffer(workspace_bytes, 1, "workspace_bytes");
    const auto plan = lmtfast::cuda::make_plan(*network, shared_bytes);
    const auto size = static_cast<int64_t>(plan.size());
    if (table != nullptr) {
      require(capacity >= size, "room for the table", capacity, "capacity");
      std::copy(plan.begin(), plan.end(), table);
    }
    *table_size = size;
    *workspace_bytes = lmtfast::cuda::workspace_bytes(lmtfast::cuda::header_of(plan.data()));
  });
}

lmtfast_status lmtfast_cuda_spectral_step(const int64_t* plan, const int64_t* device_plan,
                                          const lmtfast_tensor* tensors, int64_t n_tensors,
                                          const float* state, float* new_state, float* sigmas,
                                          float* saved, void* workspace, void* stream) {
  return lmtfast::guarded([&] {
    const auto& header = require_call(plan, device_plan, tensors, n_tensors, workspace);
    require_buffer(state, header.state_size, "state");
    require_buffer(sigmas, header.n_rows, "sigmas");
    require_buffer(saved, header.saved_size, "saved");
    lmtfast::cuda::spectral_step({plan, device_plan}, tensors, n_tensors, state, new_state, sigmas,
                                 saved, workspace, stream);
  });
}

lmtfast_status lmtfast_cuda_spectral_vjp(const int64_t* plan, const int64_t* device_plan,
                                         const lmtfast_tensor* tensors, int64_t n_tensors,
                                         const float* saved, const float* grad_sigmas,
                                         const lmtfast_tensor* grads, void* workspace,
                                         void* stream) {
  return lmtfast::guarded([&] {
    const auto& header = require_call(plan, device_plan, tensors, n_tensors, workspace);
    require_buffer(saved, header.saved_size, "saved");
    require_buffer(grad_sigmas, header.n_rows, "grad_sigmas");
    require_grads(tensors, grads, n_tensors);
    lmtfast::cuda::spectral_vjp({plan, device_plan}, tensors, n_tensors, saved, grad_sigmas, grads,
                                workspace, stream);
  });
}

lmtfast_status lmtfast_cuda_compose(const int64_t* plan, const int64_t* device_plan,
                                    const float* sigmas, float* values, float* jacobian,
                                    void* workspace, void* stream) {
  return lmtfast::guarded([&] {
    const auto& header = lmtfast::cuda::header_of(plan);
    require(header.n_tape > 0, "a tape of at least one step", header.n_tape, "plan");
    require(device_plan != nullptr, "a plan on the device", 0, "device_plan");
    require_buffer(sigmas, header.n_rows, "sigmas");
    require_buffer(values, 2, "values");
    require_buffer(jacobian, header.n_rows, "jacobian");
    require_buffer(workspace, 1, "workspace");
    lmtfast::cuda::compose({plan, device_plan}, sigmas, values, jacobian, workspace, stream);
  });
}
