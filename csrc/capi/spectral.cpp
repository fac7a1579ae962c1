// SPDX-License-Identifier: MIT
// C ABI -> spectral norms. Validates once; the kernels below assume valid input.
#include "ops/spectral.h"

#include <cstddef>
#include <type_traits>

static_assert(std::is_trivially_copyable_v<lmtfast_op_row> &&
              std::is_standard_layout_v<lmtfast_op_row>);
static_assert(sizeof(lmtfast_op_row) == LMTFAST_OP_ROW_FIELDS * sizeof(int64_t),
              "one int64 per field, no padding");
static_assert(offsetof(lmtfast_op_row, in) == 15 * sizeof(int64_t));
static_assert(offsetof(lmtfast_op_row, dilation) == 33 * sizeof(int64_t));
static_assert(sizeof(lmtfast_scale_row) == LMTFAST_SCALE_ROW_FIELDS * sizeof(int64_t));
static_assert(sizeof(lmtfast_instruction) == LMTFAST_INSTRUCTION_FIELDS * sizeof(int64_t));

namespace {

void require_buffer(const void* pointer, int64_t extent, const char* name) {
  lmtfast::require(pointer != nullptr || extent == 0, "a non-null pointer", 0, name);
}

void require_network(const lmtfast_network* network) {
  lmtfast::require(network != nullptr, "a network", 0, "network");
}

void require_grads(const lmtfast_tensor* tensors, const lmtfast_tensor* grads, int64_t n) {
  lmtfast::require(grads != nullptr || n == 0, "a non-null pointer", 0, "grads");
  for (int64_t i = 0; i < n; ++i) {
    if (grads[i].data == nullptr) continue;
    lmtfast::require(grads[i].dtype == LMTFAST_FLOAT32, "dtype float32", grads[i].dtype, "grads");
    lmtfast::require(grads[i].size == tensors[i].size, "the size of the tensor", grads[i].size,
                     "grads");
    lmtfast::require(grads[i].tap_major == tensors[i].tap_major, "the layout of the tensor",
                     grads[i].tap_major, "grads");
  }
}

void require_row(const lmtfast_network* network, int64_t row, const lmtfast_tensor* tensors,
                 int64_t n_tensors, const float* u, const float* v, int64_t num_threads) {
  require_network(network);
  lmtfast::require(num_threads >= 0, "num_threads >= 0", num_threads, "num_threads");
  lmtfast::validate(*network, tensors, n_tensors);
  lmtfast::require(row >= 0 && row < network->n_rows && network->rows[row].kind == LMTFAST_STENCIL,
                   "a row of kind 1", row, "row");
  require_buffer(u, 1, "u");
  require_buffer(v, 1, "v");
}

}  // namespace

lmtfast_status lmtfast_spectral_step(const lmtfast_network* network, const lmtfast_tensor* tensors,
                                     int64_t n_tensors, const float* state, float* new_state,
                                     float* sigmas, float* saved, int64_t num_threads) {
  return lmtfast::guarded([&] {
    require_network(network);
    lmtfast::require(num_threads >= 0, "num_threads >= 0", num_threads, "num_threads");
    lmtfast::validate(*network, tensors, n_tensors);
    require_buffer(state, network->state_size, "state");
    require_buffer(sigmas, network->n_rows, "sigmas");
    require_buffer(saved, network->saved_size, "saved");
    lmtfast::cpu::spectral_step(*network, tensors, state, new_state, sigmas, saved, num_threads);
  });
}

lmtfast_status lmtfast_spectral_vjp(const lmtfast_network* network, const lmtfast_tensor* tensors,
                                    int64_t n_tensors, const float* saved, const float* grad_sigmas,
                                    const lmtfast_tensor* grads, int64_t num_threads) {
  return lmtfast::guarded([&] {
    require_network(network);
    lmtfast::require(num_threads >= 0, "num_threads >= 0", num_threads, "num_threads");
    lmtfast::validate(*network, tensors, n_tensors);
    require_buffer(saved, network->saved_size, "saved");
    require_buffer(grad_sigmas, network->n_rows, "grad_sigmas");
    require_grads(tensors, grads, n_tensors);
    lmtfast::cpu::spectral_vjp(*network, tensors, saved, grad_sigmas, grads, n_tensors,
                               num_threads);
  });
}

lmtfast_status lmtfast_matvec(const lmtfast_network* network, int64_t row,
                              const lmtfast_tensor* tensors, int64_t n_tensors, const float* v,
                              float* u, int64_t num_threads) {
  return lmtfast::guarded([&] {
    require_row(network, row, tensors, n_tensors, u, v, num_threads);
    lmtfast::cpu::matvec(*network, row, tensors, v, u, num_threads);
  });
}

lmtfast_status lmtfast_rmatvec(const lmtfast_network* network, int64_t row,
                               const lmtfast_tensor* tensors, int64_t n_tensors, const float* u,
                               float* v, int64_t num_threads) {
  return lmtfast::guarded([&] {
    require_row(network, row, tensors, n_tensors, u, v, num_threads);
    lmtfast::cpu::rmatvec(*network, row, tensors, u, v, num_threads);
  });
}

lmtfast_status lmtfast_weight_vjp(const lmtfast_network* network, int64_t row,
                                  const lmtfast_tensor* tensors, int64_t n_tensors, const float* u,
                                  const float* v, const lmtfast_tensor* grads,
                                  int64_t num_threads) {
  return lmtfast::guarded([&] {
    require_row(network, row, tensors, n_tensors, u, v, num_threads);
    require_grads(tensors, grads, n_tensors);
    lmtfast::cpu::weight_vjp(*network, row, tensors, n_tensors, u, v, grads, num_threads);
  });
}

lmtfast_status lmtfast_compose(const lmtfast_network* network, const float* sigmas, float* values,
                               float* jacobian) {
  return lmtfast::guarded([&] {
    require_network(network);
    lmtfast::validate_tape(*network);
    require_buffer(sigmas, network->n_rows, "sigmas");
    require_buffer(values, 2, "values");
    require_buffer(jacobian, network->n_rows, "jacobian");
    lmtfast::cpu::compose(*network, sigmas, values, jacobian);
  });
}
