// SPDX-License-Identifier: MIT
// Power steps on a convolution's symbol at many frequencies, as lmtfast/engines/frequency.py has
// them: what a rescan of the symbol engine spends its time on.
#pragma once

#include <cstdint>

namespace lmtfast {

// A(w)[r, p C + c] = sum over the taps t of phase p of acting[r, c, t] terms[w, t], for G groups.
// Complex numbers are (re, im) pairs.
struct PowerVectors {
  const float* acting;   // (G, R, C, T), of modulus one at most
  const int64_t* phase;  // (T), in [0, P)
  const float* terms;    // (N, T, 2)
  const float* start;    // (P C, 2): the first vector, of length one
  float* norms;          // (G, N)
  float* vectors;        // (G, N, P C, 2)
  int64_t groups, rows, channels, taps, phases, frequencies, steps, threads;

  int64_t width() const { return phases * channels; }
};

// Throws InvalidArgument unless sizes are not negative and phases in range.
void validate(const PowerVectors& problem);

namespace cpu {
void power_vectors(const PowerVectors& problem);
}

}  // namespace lmtfast
