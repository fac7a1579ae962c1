// SPDX-License-Identifier: MIT
// One operator of a table by itself: A v, A^T u and the gradient of <u, A v>, for other frameworks.
#include <algorithm>

#include "ops/cpu/convolution.h"
#include "ops/cpu/task_list.h"

namespace lmtfast::cpu {
namespace {

// y = A x of the stencil, or its adjoint.
void apply(const Convolution& op, bool forward, const float* x, float* y, int64_t threads) {
  const ConvolutionKernels& kernels = convolution_kernels(best_isa());
  const bool direct = forward && in_place(op);
  const int64_t floats = forward ? plane_floats(op) : panel_floats(op, kernels);
  std::vector<float> memory(static_cast<size_t>(floats), 0.0f);
  std::vector<double> squares(
      static_cast<size_t>(forward ? image_squares(op) : adjoint_squares(op)));
  float* packed = memory.data() + kSlack;
  if (!forward) {
    kernels.fill_panels(op, x, packed, 0, op.row.groups * op.row.rows);
  } else if (!direct) {
    kernels.fill_planes(op, x, true, packed, 0, op.row.groups * op.row.channels);
  }
  Workers workers(choose_threads(threads, op.multiply_adds(), kGrain),
                  workspace_floats(op, kernels));
  const int64_t target =
      std::max(kGrain, op.multiply_adds() / (workers.threads() * kTasksPerThread));
  const auto blocks =
      forward ? image_blocks(op, kernels, target) : adjoint_blocks(op, kernels, target);
  workers.run(blocks, [&](const Block& b, float* space) {
    if (forward) {
      kernels.image(op, direct ? x : packed, x, y, squares.data(), b, space);
    } else {
      kernels.adjoint(op, packed, x, y, squares.data(), b, space);
    }
  });
}

Convolution operator_of(const lmtfast_network& net, int64_t row, const lmtfast_tensor* tensors,
                        std::vector<float>& scales) {
  scales.resize(static_cast<size_t>(net.scale_size));
  fill_scales(net, tensors, scales.data());
  return Convolution(net.rows[row], tensors[net.rows[row].weight_slot], scales.data());
}

}  // namespace

void matvec(const lmtfast_network& net, int64_t row, const lmtfast_tensor* tensors, const float* v,
            float* u, int64_t threads) {
  std::vector<float> scales;
  const Convolution op = operator_of(net, row, tensors, scales);
  apply(op, op.row.transposed == 0, v, u, threads);
}

void rmatvec(const lmtfast_network& net, int64_t row, const lmtfast_tensor* tensors, const float* u,
             float* v, int64_t threads) {
  std::vector<float> scales;
  const Convolution op = operator_of(net, row, tensors, scales);
  apply(op, op.row.transposed != 0, u, v, threads);
}

void weight_vjp(const lmtfast_network& net, int64_t row, const lmtfast_tensor* tensors,
                int64_t n_tensors, const float* u, const float* v, const lmtfast_tensor* grads,
                int64_t threads) {
  lmtfast_op_row alone = net.rows[row];
  alone.engine = LMTFAST_OPERATOR;
  alone.state_offset = 0;
  alone.saved_offset = net.scale_size;
  lmtfast_network single = net;
  single.rows = &alone;
  single.n_rows = 1;
  single.saved_size = net.scale_size + saved_entries(alone);
  std::vector<float> saved(static_cast<size_t>(single.saved_size));
  fill_scales(net, tensors, saved.data());
  const int64_t inputs = state_entries(alone), outputs = saved_entries(alone) - inputs;
  std::copy(u, u + outputs, saved.data() + net.scale_size);
  std::copy(v, v + inputs, saved.data() + net.scale_size + outputs);
  const float one = 1.0f;
  spectral_vjp(single, tensors, saved.data(), &one, grads, n_tensors, threads);
}

}  // namespace lmtfast::cpu
