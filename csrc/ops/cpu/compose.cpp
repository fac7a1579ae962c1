// SPDX-License-Identifier: MIT
// The tape over the norms, forward and adjoint: a few dozen scalar operations, in double.
#include <cmath>
#include <string>

#include "ops/spectral.h"

namespace lmtfast {

void validate_tape(const lmtfast_network& net) {
  const auto need = [](bool ok, const char* expected, int64_t got, int64_t i) {
    if (!ok) throw_invalid(expected, got, "tape[" + std::to_string(i) + "]");
  };
  require(net.n_tape >= 1 && net.tape, "a tape of at least one step", net.n_tape, "n_tape");
  for (int64_t i = 0; i < net.n_tape; ++i) {
    const lmtfast_instruction& step = net.tape[i];
    need(step.operation >= LMTFAST_CONSTANT && step.operation <= LMTFAST_MAX, "an operation",
         step.operation, i);
    if (step.operation == LMTFAST_SIGMA) {
      need(step.a >= 0 && step.a < net.n_rows, "an operator", step.a, i);
    } else if (step.operation != LMTFAST_CONSTANT) {
      need(step.a >= 0 && step.a < i, "an earlier step", step.a, i);
      need(step.b >= 0 && step.b < i, "an earlier step", step.b, i);
    }
  }
  require(net.features >= 0 && net.features < net.n_tape, "a step", net.features, "features");
  require(net.total >= 0 && net.total < net.n_tape, "a step", net.total, "total");
}

namespace cpu {
namespace {

double run(const lmtfast_instruction& step, const double* value, const float* sigmas) {
  const double a = step.operation >= LMTFAST_MUL ? value[step.a] : 0.0;
  const double b = step.operation >= LMTFAST_MUL ? value[step.b] : 0.0;
  switch (step.operation) {
    case LMTFAST_SIGMA:
      return sigmas[step.a];
    case LMTFAST_MUL:
      return a * b;
    case LMTFAST_ADD:
      return a + b;
    case LMTFAST_HYPOT:
      return std::sqrt(a * a + b * b);
    case LMTFAST_MAX:
      // NaN on either side must come through.
      return a >= b || std::isnan(a) ? a : b;
    default:
      return step.constant;
  }
}

// Adds `grad` times the derivatives of one step to its operands.
void pull(const lmtfast_instruction& step, const double* value, double result, double grad,
          double* adjoint) {
  const double a = value[step.a], b = value[step.b];
  switch (step.operation) {
    case LMTFAST_MUL:
      adjoint[step.a] += grad * b;
      adjoint[step.b] += grad * a;
      return;
    case LMTFAST_ADD:
      adjoint[step.a] += grad;
      adjoint[step.b] += grad;
      return;
    case LMTFAST_HYPOT:
      if (result == 0.0) return;
      adjoint[step.a] += grad * (a / result);
      adjoint[step.b] += grad * (b / result);
      return;
    default:  // LMTFAST_MAX; both operands where one is NaN, as PyTorch has it
      adjoint[step.a] += a == b ? 0.5 * grad : a < b ? 0.0 : grad;
      adjoint[step.b] += a == b ? 0.5 * grad : a > b ? 0.0 : grad;
  }
}

}  // namespace

void compose(const lmtfast_network& net, const float* sigmas, float* values, float* jacobian) {
  std::vector<double> value(static_cast<size_t>(net.n_tape));
  for (int64_t i = 0; i < net.n_tape; ++i) value[i] = run(net.tape[i], value.data(), sigmas);
  const int64_t outputs[] = {net.features, net.total};
  std::vector<double> adjoint, row;
  for (int which = 0; which < 2; ++which) {
    values[which] = static_cast<float>(value[outputs[which]]);
    adjoint.assign(static_cast<size_t>(net.n_tape), 0.0);
    row.assign(static_cast<size_t>(net.n_rows), 0.0);
    adjoint[outputs[which]] = 1.0;
    for (int64_t i = outputs[which]; i >= 0; --i) {
      const lmtfast_instruction& step = net.tape[i];
      if (adjoint[i] == 0.0 || step.operation == LMTFAST_CONSTANT) continue;
      if (step.operation == LMTFAST_SIGMA) {
        row[step.a] += adjoint[i];
      } else {
        pull(step, value.data(), value[i], adjoint[i], adjoint.data());
      }
    }
    for (int64_t r = 0; r < net.n_rows; ++r) {
      jacobian[which * net.n_rows + r] = static_cast<float>(row[r]);
    }
  }
}

}  // namespace cpu
}  // namespace lmtfast
