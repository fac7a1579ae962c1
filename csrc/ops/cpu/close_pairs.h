// SPDX-License-Identifier: MIT
// Pairs of rows so close, for how far they lie from the centre, that products would leave little of
// their difference. In a gradient that little is divided by their distance.
#pragma once

#include <cstdint>
#include <vector>

#include "core/element.h"
#include "core/parallel.h"

namespace lmtfast {

// Squared distance over the rows' squares below which products are not trusted.
constexpr double kClose = 1.0 / 64;

// Of a table of norms (u, k) of a head, as csrc/ops/cpu/pair_norm.cpp has it.
template <class Head>
struct ClosePairs {
  const Head& head;
  std::vector<double> squares;  // (k), from the centre

  explicit ClosePairs(const Head& h) : head(h), squares(static_cast<size_t>(h.p.k)) {
    parallel_for(head.p.k, head.threads, [&](int64_t j) {
      squares[j] = head.kernel.square_from(head.centre.data(), head.rows[j], head.p.d);
    });
  }

  // Whether column j is one, in a row whose class has `square`.
  bool has(double square, int64_t j, float norm) const {
    const double distance = static_cast<double>(norm) * static_cast<double>(norm);
    return distance > 0 && distance < kClose * (square + squares[j]);
  }

  // Entries [begin, begin + count) of row i of grad with zeros at close pairs, in `room`; null where
  // there are none.
  const float* others(int64_t i, int64_t begin, int64_t count, const float* norms,
                      const float* grad, std::vector<float>& room) const {
    const double square = squares[head.class_of(i)];
    int64_t found = 0;
#pragma omp simd reduction(+ : found)
    for (int64_t j = 0; j < count; ++j) found += has(square, begin + j, norms[j]) ? 1 : 0;
    if (found == 0) return nullptr;
    room.resize(static_cast<size_t>(count));
    for (int64_t j = 0; j < count; ++j) room[j] = has(square, begin + j, norms[j]) ? 0.0f : grad[j];
    return room.data();
  }

  // Adds their share of the gradient, from differences: a class receives what its own rows of the
  // table send, and what the other rows send to its column.
  template <class W>
  void add(const float* norms, const float* grad, W* grad_weight) const {
    const int64_t k = head.p.k, d = head.p.d;
    parallel_for(k, head.threads, [&](int64_t t) {
      std::vector<double> sums(static_cast<size_t>(d));
      const auto receive = [&](int64_t i, int64_t j, int64_t other) {
        const float norm = norms[i * k + j];
        if (!has(squares[head.class_of(i)], j, norm)) return;
        const double ratio = static_cast<double>(grad[i * k + j]) / static_cast<double>(norm);
        head.kernel.add_difference(ratio, head.rows[t], head.rows[other], d, sums.data());
      };
      for (int64_t i = 0; i < head.p.u; ++i) {
        const int64_t own = head.class_of(i);
        if (own != t) receive(i, t, own);
        for (int64_t j = 0; own == t && j < k; ++j) receive(i, j, j);
      }
      W* out = grad_weight + t * d;
      for (int64_t f = 0; f < d; ++f) narrow(widen(out[f]) + static_cast<float>(sums[f]), out + f);
    });
  }
};

}  // namespace lmtfast
