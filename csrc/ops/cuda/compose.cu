// SPDX-License-Identifier: MIT
// The tape over the norms and its derivatives for the bounds of features and logits, in double:
// ops/cpu/compose.cpp on one block. A tape is a chain; one thread runs it, one per output turns back.
#include <cmath>

#include "ops/cuda/spectral.h"
#include "ops/cuda/view.h"

namespace lmtfast::cuda {
namespace {

constexpr int kThreads = 64;
// Values and adjoints of a tape that fits stay in shared memory.
constexpr int64_t kSharedDoubles = 5 << 10;

__device__ double run(const lmtfast_instruction& step, const double* value, const float* sigmas) {
  if (step.operation == LMTFAST_CONSTANT) return step.constant;
  if (step.operation == LMTFAST_SIGMA) return sigmas[step.a];
  const double a = value[step.a], b = value[step.b];
  if (step.operation == LMTFAST_MUL) return a * b;
  if (step.operation == LMTFAST_ADD) return a + b;
  if (step.operation == LMTFAST_HYPOT) return std::sqrt(a * a + b * b);
  // NaN on either side must come through.
  return a >= b || a != a ? a : b;
}

// Adds `grad` times the derivatives of one step to its operands.
__device__ void pull(const lmtfast_instruction& step, const double* value, double result,
                     double grad, double* adjoint) {
  const double a = value[step.a], b = value[step.b];
  double da = 1.0, db = 1.0;
  if (step.operation == LMTFAST_MUL) {
    da = b;
    db = a;
  } else if (step.operation == LMTFAST_HYPOT) {
    if (result == 0.0) return;
    da = a / result;
    db = b / result;
  } else if (step.operation == LMTFAST_MAX) {
    da = a == b ? 0.5 : a > b ? 1.0 : 0.0;
    db = 1.0 - da;
  }
  adjoint[step.a] += grad * da;
  adjoint[step.b] += grad * db;
}

__global__ void compose_kernel(const lmtfast_instruction* tape, int64_t n_tape, int64_t n_rows,
                               int64_t features, int64_t total, const float* sigmas, float* values,
                               float* jacobian, double* workspace) {
  LMTFAST_DYNAMIC_SHARED(double, shared);
  double* value = workspace == nullptr ? shared : workspace;
  double* adjoints = value + n_tape;  // (2, n_tape)
  double* rows = value + 3 * n_tape;  // (2, n_rows)
  for (int64_t i = threadIdx.x; i < 2 * n_tape + 2 * n_rows; i += kThreads) adjoints[i] = 0.0;
  if (threadIdx.x == 0) {
    for (int64_t i = 0; i < n_tape; ++i) value[i] = run(tape[i], value, sigmas);
  }
  __syncthreads();
  // A thread of each warp, so that the two outputs do not wait for each other.
  if (threadIdx.x % kWarpSize == 0) {
    const int which = static_cast<int>(threadIdx.x) / kWarpSize;
    const int64_t output = which == 0 ? features : total;
    double* adjoint = adjoints + which * n_tape;
    values[which] = static_cast<float>(value[output]);
    adjoint[output] = 1.0;
    for (int64_t i = output; i >= 0; --i) {
      const lmtfast_instruction& step = tape[i];
      if (adjoint[i] == 0.0 || step.operation == LMTFAST_CONSTANT) continue;
      if (step.operation == LMTFAST_SIGMA) {
        rows[which * n_rows + step.a] += adjoint[i];
      } else {
        pull(step, value, value[i], adjoint[i], adjoint);
      }
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < 2 * n_rows; i += kThreads) {
    jacobian[i] = static_cast<float>(rows[i]);
  }
}
static_assert(kThreads == 2 * kWarpSize);

}  // namespace

void compose(const Plan& plan, const float* sigmas, float* values, float* jacobian, void* workspace,
             Stream stream) {
  const PlanHeader& h = header_of(plan.host);
  const auto* tape = reinterpret_cast<const lmtfast_instruction*>(plan.device + h.tape);
  const int64_t doubles = compose_doubles(h);
  const bool fits = doubles <= kSharedDoubles;
  LMTFAST_LAUNCH(compose_kernel, 1, kThreads, fits ? doubles * sizeof(double) : 0, stream, tape,
                 h.n_tape, h.n_rows, h.features, h.total, sigmas, values, jacobian,
                 fits ? nullptr : static_cast<double*>(workspace));
}

}  // namespace lmtfast::cuda
