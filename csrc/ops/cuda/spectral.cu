// SPDX-License-Identifier: MIT
// The launches of one step and of one gradient.
#include <algorithm>

#include "ops/cuda/device.h"
#include "ops/cuda/spectral.h"
#include "ops/cuda/view.h"

namespace lmtfast::cuda {
namespace {

struct Call {
  const Plan& plan;
  const PlanHeader& header;
  View view = {};
  uint64_t* table;  // of tensors, in the workspace

  Call(const Plan& p, int64_t n_tensors, void* workspace) : plan(p), header(header_of(p.host)) {
    require(n_tensors >= header.n_slots, "the tensors of the plan", n_tensors, "n_tensors");
    // Slots beyond those of the plan belong to operators run elsewhere.
    view.n_tensors = header.n_slots;
    table = static_cast<uint64_t*>(workspace);
    view.tensors = table;
    view.doubles = reinterpret_cast<double*>(table + header.n_slots);
    // Panels are read 16 bytes at a time.
    const auto floats = reinterpret_cast<uint64_t>(view.doubles + header.doubles);
    view.floats = reinterpret_cast<float*>((floats + 15) / 16 * 16);
    view.rows = reinterpret_cast<const OpRow*>(p.device + header.rows);
    view.scales = reinterpret_cast<const lmtfast_scale_row*>(p.device + header.scales);
    view.work = reinterpret_cast<const OpWork*>(p.device + header.work);
    view.n_rows = header.n_rows;
    view.n_scales = header.n_scales;
    view.counters = reinterpret_cast<int*>(view.floats + header.floats);
    view.n_counters = header.counters;
    view.circles = reinterpret_cast<const Circle*>(p.device + header.circles);
    view.sums = reinterpret_cast<const Item*>(p.device + header.stage[kGradientSums]);
    view.slots = reinterpret_cast<const Item*>(p.device + header.stage[kGradientSlots]);
  }

  unsigned blocks(Stage stage) const { return static_cast<unsigned>(header.blocks[stage]); }
  // The view of a launch whose first block is item `first` of a stage.
  View at(Stage stage, int64_t first = 0) const {
    View v = view;
    v.items = reinterpret_cast<const Item*>(plan.device + header.stage[stage]) + first;
    return v;
  }
};

std::vector<uint64_t> words(const lmtfast_tensor* tensors, int64_t n) {
  std::vector<uint64_t> result(static_cast<size_t>(n));
  std::transform(tensors, tensors + n, result.begin(), tensor_word);
  return result;
}

}  // namespace

void spectral_step(const Plan& plan, const lmtfast_tensor* tensors, int64_t n_tensors,
                   const float* state, float* new_state, float* sigmas, float* saved,
                   void* workspace, Stream stream) {
  Call call(plan, n_tensors, workspace);
  call.view.state = state;
  call.view.new_state = new_state;
  call.view.sigmas = sigmas;
  call.view.saved = saved;
  const bool update = new_state != nullptr;
  launch_prepare(call.at(kPrepare), call.table, words(tensors, call.header.n_slots).data(),
                 call.blocks(kPrepare), stream);
  launch_pass(call.at(kPass), call.blocks(kPass), call.header.pass_bytes, stream);
  // The items that go on follow those that record.
  launch_pass_finish(call.at(kRecord), call.blocks(kRecord), update ? call.blocks(kFinish) : 0,
                     call.header.finish_bytes, stream);
  launch_stencil(call.at(kFirstImage), false, false, call.blocks(kFirstImage), stream);
  launch_stencil(call.at(kFirstAdjoint), true, false, call.blocks(kFirstAdjoint), stream);
  if (update) {
    launch_stencil(call.at(kSecondAdjoint), true, true, call.blocks(kSecondAdjoint), stream);
    launch_stencil(call.at(kSecondImage), false, true, call.blocks(kSecondImage), stream);
  }
}

void spectral_vjp(const Plan& plan, const lmtfast_tensor* tensors, int64_t n_tensors,
                  const float* saved, const float* grad_sigmas, const lmtfast_tensor* grads,
                  void* workspace, Stream stream) {
  Call call(plan, n_tensors, workspace);
  call.view.saved = const_cast<float*>(saved);  // gradients read it
  call.view.grad_sigmas = grad_sigmas;
  const int64_t n = call.header.n_slots;
  const auto weights = words(tensors, n), outputs = words(grads, n);
  const auto wanted = [&](int64_t slot) { return slot >= 0 && grads[slot].data != nullptr; };
  const lmtfast_network net = network_of(plan.host);
  std::vector<char> read(static_cast<size_t>(n_tensors), 0);
  bool scales = false;
  for (int64_t i = 0; i < net.n_rows; ++i) {
    if (net.rows[i].kind == LMTFAST_STENCIL) read[net.rows[i].weight_slot] = 1;
  }
  const auto* slots = reinterpret_cast<const Item*>(plan.host + call.header.stage[kGradientSlots]);
  for (int64_t i = 0; i < call.header.blocks[kGradientSlots]; ++i) {
    read[slots[i].op] = 1;
    scales = scales || wanted(slots[i].op);
  }
  for (int64_t slot = 0; slot < n_tensors; ++slot) {
    if (wanted(slot) && !read[slot]) {
      zero(grads[slot].data, grads[slot].size * static_cast<int64_t>(sizeof(float)), stream);
    }
  }
  if (scales) {
    call.view.grad_scales = call.view.floats + call.header.grad_scales;
    zero(call.view.counters, call.header.n_circles * static_cast<int64_t>(sizeof(int)), stream);
  }
  const int64_t* rounds = plan.host + call.header.rounds;
  for (int64_t round = 0; round < call.header.n_rounds; ++round) {
    launch_gradient(call.at(kGradient, rounds[round]), weights.data(), outputs.data(),
                    static_cast<unsigned>(rounds[round + 1] - rounds[round]), stream);
  }
}

}  // namespace lmtfast::cuda
