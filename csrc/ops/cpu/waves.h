// SPDX-License-Identifier: MIT
// The operators of a call, in order, in waves of bounded memory. A wave is packed while the one
// before it multiplies, so that neighbours have memory of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "ops/cpu/convolution.h"

namespace lmtfast::cpu {

// Weights and packed vectors of a wave.
constexpr int64_t kWaveBytes = int64_t{32} << 20;

class Waves {
 public:
  // Appends an operator, whose planes and other `operands`, in floats, are packed; it begins a wave
  // where there is no room left, or where it must.
  void add(const Convolution& op, int64_t operands, bool begins = false) {
    const Packed packed{plane_floats(op), plane_floats(op) + operands};
    const int64_t bytes = 4 * (packed.floats + op.weight_entries());
    if (first_.empty() || begins || bytes_ + bytes > kWaveBytes) {
      first_.push_back(packed_.size());
      bytes_ = floats_ = 0;
    }
    packed_.push_back(packed);
    bytes_ += bytes;
    floats_ += packed.floats;
    int64_t& most = most_[(first_.size() - 1) % 2];
    most = std::max(most, floats_);
  }

  size_t count() const { return first_.size(); }

  // Calls body(i) for every operator of a wave; there is none before the first or after the last.
  template <class Body>
  void each(size_t wave, Body&& body) const {
    if (wave >= count()) return;
    const size_t end = wave + 1 < count() ? first_[wave + 1] : packed_.size();
    for (size_t i = first_[wave]; i < end; ++i) body(i);
  }

  // The same as body(i, planes, operands), with the memory for what is packed.
  template <class Body>
  void place(size_t wave, Body&& body) {
    if (wave >= count()) return;
    std::unique_ptr<float[]>& memory = memory_[wave % 2];
    if (!memory) memory.reset(new float[static_cast<size_t>(most_[wave % 2])]);
    float* at = memory.get();
    each(wave, [&](size_t i) {
      const auto [planes, floats] = packed_[i];
      if (planes > 0) {
        std::memset(at, 0, kSlack * sizeof(float));
        std::memset(at + planes - kSlack, 0, kSlack * sizeof(float));
      }
      body(i, at + kSlack, at + planes + kSlack);
      at += floats;
    });
  }

 private:
  struct Packed {
    int64_t planes, floats;
  };
  std::vector<Packed> packed_;
  std::vector<size_t> first_;  // operator of each wave
  int64_t bytes_ = 0, floats_ = 0;
  int64_t most_[2] = {0, 0};
  std::unique_ptr<float[]> memory_[2];
};

}  // namespace lmtfast::cpu
