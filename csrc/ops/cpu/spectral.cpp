// SPDX-License-Identifier: MIT
// All operators of a network on the CPU: scales and the diagonal maps they are, then one call per
// engine. The scale buffer and its gradient are O(channels); everything heavy is in the engines.
#include "ops/spectral.h"

#include <cmath>

namespace lmtfast::cpu {
namespace {

// constant * t[slot] / sqrt(t[variance_slot] + eps) and its parts, at one entry.
struct Factor {
  double numerator, root, value;
};

double entry(const lmtfast_tensor& t, int64_t i) {
  return static_cast<const float*>(t.data)[t.size == 1 ? 0 : i];
}

Factor factor(const lmtfast_scale_row& s, const lmtfast_tensor* tensors, int64_t i) {
  const double numerator = s.constant * (s.slot < 0 ? 1.0 : entry(tensors[s.slot], i));
  const double root =
      s.variance_slot < 0 ? 1.0 : std::sqrt(entry(tensors[s.variance_slot], i) + s.eps);
  return {numerator, root, s.inverse ? root / numerator : numerator / root};
}

// Gradient in the tensors of one factor, given that in its value.
void factor_vjp(const lmtfast_scale_row& s, const lmtfast_tensor* tensors,
                const lmtfast_tensor* grads, int64_t i, double grad_value) {
  const Factor f = factor(s, tensors, i);
  const auto add = [&](int64_t slot, double value) {
    if (slot < 0 || grads[slot].data == nullptr) return;
    static_cast<float*>(grads[slot].data)[grads[slot].size == 1 ? 0 : i] +=
        static_cast<float>(grad_value * value);
  };
  // value = (constant t / root)^(+-1), root = sqrt(variance + eps)
  const double sign = s.inverse ? -1.0 : 1.0;
  const double per_numerator = s.inverse ? -f.value / f.numerator : 1.0 / f.root;
  add(s.slot, s.constant * per_numerator);
  add(s.variance_slot, -0.5 * sign * f.value / (f.root * f.root));
}

void scales_vjp(const lmtfast_network& net, const lmtfast_tensor* tensors,
                const lmtfast_tensor* grads, const std::vector<double>& grad_scales) {
  for (int64_t k = 0; k < net.n_scales; ++k) {
    const lmtfast_scale_row& s = net.scales[k];
    std::vector<int64_t> siblings;
    for (int64_t other = 0; other < net.n_scales; ++other) {
      if (other != k && net.scales[other].offset == s.offset) siblings.push_back(other);
    }
    for (int64_t i = 0; i < s.length; ++i) {
      double others = 1.0;
      for (const int64_t other : siblings) others *= factor(net.scales[other], tensors, i).value;
      factor_vjp(s, tensors, grads, i, grad_scales[s.offset + i] * others);
    }
  }
}

std::vector<int64_t> rows_of(const lmtfast_network& net, int64_t engine) {
  std::vector<int64_t> which;
  for (int64_t i = 0; i < net.n_rows; ++i) {
    if (net.rows[i].kind == LMTFAST_STENCIL && net.rows[i].engine == engine) which.push_back(i);
  }
  return which;
}

// The entry of a diagonal map that is its norm: the first of the largest, or of those that are NaN.
int64_t largest_entry(const lmtfast_op_row& row, const float* scales) {
  int64_t best = row.row_scale;
  for (int64_t i = best; i < row.row_scale + row.rows; ++i) {
    const float now = std::fabs(scales[i]), before = std::fabs(scales[best]);
    if (now > before || (now != now && before == before)) best = i;
  }
  return best;
}

void diagonal_step(const lmtfast_network& net, const float* scales, float* sigmas) {
  for (int64_t i = 0; i < net.n_rows; ++i) {
    const lmtfast_op_row& row = net.rows[i];
    if (row.kind == LMTFAST_DIAGONAL) sigmas[i] = std::fabs(scales[largest_entry(row, scales)]);
  }
}

// A subgradient: all of it belongs to the entry that is the norm.
void diagonal_vjp(const lmtfast_network& net, const float* scales, const float* grad_sigmas,
                  double* grad_scales) {
  for (int64_t i = 0; i < net.n_rows; ++i) {
    const lmtfast_op_row& row = net.rows[i];
    if (row.kind != LMTFAST_DIAGONAL) continue;
    const int64_t at = largest_entry(row, scales);
    if (scales[at] == 0.0f) continue;
    grad_scales[at] += static_cast<double>(scales[at] < 0.0f ? -grad_sigmas[i] : grad_sigmas[i]);
  }
}

bool wants_scales(const lmtfast_network& net, const lmtfast_tensor* grads) {
  for (int64_t k = 0; k < net.n_scales; ++k) {
    for (const int64_t slot : {net.scales[k].slot, net.scales[k].variance_slot}) {
      if (slot >= 0 && grads[slot].data != nullptr) return true;
    }
  }
  return false;
}

}  // namespace

void fill_scales(const lmtfast_network& net, const lmtfast_tensor* tensors, float* scales) {
  std::vector<double> product(static_cast<size_t>(net.scale_size), 1.0);
  for (int64_t k = 0; k < net.n_scales; ++k) {
    const lmtfast_scale_row& s = net.scales[k];
    for (int64_t i = 0; i < s.length; ++i) product[s.offset + i] *= factor(s, tensors, i).value;
  }
  for (int64_t i = 0; i < net.scale_size; ++i) scales[i] = static_cast<float>(product[i]);
}

void spectral_step(const lmtfast_network& net, const lmtfast_tensor* tensors, const float* state,
                   float* new_state, float* sigmas, float* saved, int64_t threads) {
  fill_scales(net, tensors, saved);
  diagonal_step(net, saved, sigmas);
  using Engine = void (*)(const SpectralStep&);
  const Engine engines[] = {operator_step, symbol_step, separable_step};
  for (int64_t engine = LMTFAST_OPERATOR; engine <= LMTFAST_SEPARABLE; ++engine) {
    SpectralStep step{net, tensors, state, new_state, sigmas, saved, threads, rows_of(net, engine)};
    if (!step.which.empty()) engines[engine](step);
  }
}

void spectral_vjp(const lmtfast_network& net, const lmtfast_tensor* tensors, const float* saved,
                  const float* grad_sigmas, const lmtfast_tensor* grads, int64_t n_tensors,
                  int64_t threads) {
  std::vector<char> written(static_cast<size_t>(n_tensors), 0);
  std::vector<char> accumulate(static_cast<size_t>(net.n_rows), 0);
  using Engine = void (*)(const SpectralVjp&);
  const Engine engines[] = {operator_vjp, symbol_vjp, separable_vjp};
  // In the order in which the engines run below, not that of the table.
  for (int64_t engine = LMTFAST_OPERATOR; engine <= LMTFAST_SEPARABLE; ++engine) {
    for (const int64_t i : rows_of(net, engine)) {
      accumulate[i] = written[net.rows[i].weight_slot];
      written[net.rows[i].weight_slot] = 1;
    }
  }
  for (int64_t slot = 0; slot < n_tensors; ++slot) {
    if (grads[slot].data == nullptr || written[slot]) continue;
    float* data = static_cast<float*>(grads[slot].data);
    for (int64_t i = 0; i < grads[slot].size; ++i) data[i] = 0.0f;
  }
  const bool scales = wants_scales(net, grads);
  std::vector<double> grad_scales(static_cast<size_t>(scales ? net.scale_size : 0), 0.0);
  for (int64_t engine = LMTFAST_OPERATOR; engine <= LMTFAST_SEPARABLE; ++engine) {
    SpectralVjp vjp{net,
                    tensors,
                    saved,
                    grad_sigmas,
                    grads,
                    accumulate,
                    scales ? grad_scales.data() : nullptr,
                    threads,
                    rows_of(net, engine)};
    if (!vjp.which.empty()) engines[engine](vjp);
  }
  if (!scales) return;
  diagonal_vjp(net, saved, grad_sigmas, grad_scales.data());
  scales_vjp(net, tensors, grads, grad_scales);
}

}  // namespace lmtfast::cpu
