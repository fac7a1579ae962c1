// SPDX-License-Identifier: MIT
// Included once per instruction set, inside its namespace and target region, with `v` naming the
// vectors of core/simd.h. A lane is a frequency: as many as a vector holds go together, and no
// entry of a lane meets one of another.

using Vec = v::Vec;
constexpr int64_t kWidth = v::kWidth;
// (re, im) of all lanes
constexpr int64_t kPair = 2 * kWidth;

// One row of the symbol, (P C, re or im, lanes), from a row of the kernel (C, T) and the terms
// (T, re or im, lanes).
inline void build_row(const PowerVectors& p, const float* acting, const float* terms, float* row) {
  if (p.phases > 1) std::fill(row, row + p.width() * kPair, 0.0f);
  for (int64_t c = 0; c < p.channels; ++c, acting += p.taps) {
    if (p.phases == 1) {
      Vec re = v::zero(), im = v::zero();
      for (int64_t t = 0; t < p.taps; ++t) {
        const Vec w = v::broadcast(acting[t]);
        re = v::fma(w, v::load(terms + t * kPair), re);
        im = v::fma(w, v::load(terms + t * kPair + kWidth), im);
      }
      v::store(row + c * kPair, re);
      v::store(row + c * kPair + kWidth, im);
      continue;
    }
    for (int64_t t = 0; t < p.taps; ++t) {
      const Vec w = v::broadcast(acting[t]);
      float* at = row + (p.phase[t] * p.channels + c) * kPair;
      v::store(at, v::fma(w, v::load(terms + t * kPair), v::load(at)));
      v::store(at + kWidth, v::fma(w, v::load(terms + t * kPair + kWidth), v::load(at + kWidth)));
    }
  }
}

// u = row x, a complex number per lane.
inline void multiply_row(const float* row, const float* x, int64_t width, Vec& re, Vec& im) {
  Vec rr = v::zero(), ii = v::zero(), ri = v::zero(), ir = v::zero();
  for (int64_t j = 0; j < width; ++j, row += kPair, x += kPair) {
    const Vec ar = v::load(row), ai = v::load(row + kWidth);
    const Vec xr = v::load(x), xi = v::load(x + kWidth);
    rr = v::fma(ar, xr, rr);
    ii = v::fma(ai, xi, ii);
    ri = v::fma(ar, xi, ri);
    ir = v::fma(ai, xr, ir);
  }
  re = v::fma(v::broadcast(-1.0f), ii, rr);
  im = v::fma(v::broadcast(1.0f), ir, ri);
}

// back += conj(row) u
inline void add_row(const float* row, Vec re, Vec im, int64_t width, float* back) {
  const Vec down = v::fma(v::broadcast(-1.0f), re, v::zero());
  for (int64_t j = 0; j < width; ++j, row += kPair, back += kPair) {
    const Vec ar = v::load(row), ai = v::load(row + kWidth);
    v::store(back, v::fma(ar, re, v::fma(ai, im, v::load(back))));
    v::store(back + kWidth, v::fma(ar, im, v::fma(ai, down, v::load(back + kWidth))));
  }
}

// Sums of squares of (n, re or im, lanes), per lane.
inline void squares(const float* x, int64_t n, float* sums) {
  Vec re = v::zero(), im = v::zero();
  for (int64_t j = 0; j < n; ++j, x += kPair) {
    const Vec a = v::load(x), b = v::load(x + kWidth);
    re = v::fma(a, a, re);
    im = v::fma(b, b, im);
  }
  v::store(sums, v::fma(v::broadcast(1.0f), re, im));
}

// All power steps of one group at frequencies [first, first + count), count <= kWidth. `held` takes
// the symbol where the rows fit, `row` one row where they do not.
inline void run(const PowerVectors& p, int64_t group, int64_t first, int64_t count, float* held,
                float* row, float* x, float* back, float* terms) {
  const int64_t width = p.width();
  const float* acting = p.acting + group * p.rows * p.channels * p.taps;
  for (int64_t lane = 0; lane < kWidth; ++lane) {
    // Lanes without a frequency repeat the last one.
    const float* from = p.terms + (first + std::min(lane, count - 1)) * 2 * p.taps;
    for (int64_t i = 0; i < 2 * p.taps; ++i) terms[i * kWidth + lane] = from[i];
    for (int64_t i = 0; i < 2 * width; ++i) x[i * kWidth + lane] = p.start[i];
  }
  const auto row_at = [&](int64_t r) {
    if (held) return held + r * width * kPair;
    build_row(p, acting + r * p.channels * p.taps, terms, row);
    return row;
  };
  for (int64_t r = 0; held && r < p.rows; ++r) {
    build_row(p, acting + r * p.channels * p.taps, terms, held + r * width * kPair);
  }
  alignas(64) float sums[kWidth], factors[kWidth];
  Vec re, im;
  for (int64_t step = 0; step < p.steps; ++step) {
    std::fill(back, back + width * kPair, 0.0f);
    for (int64_t r = 0; r < p.rows; ++r) {
      const float* a = row_at(r);
      multiply_row(a, x, width, re, im);
      add_row(a, re, im, width, back);
    }
    squares(back, width, sums);
    for (int64_t lane = 0; lane < kWidth; ++lane) {
      const float length = std::sqrt(sums[lane]);
      factors[lane] = length > 0.0f || length != length ? 1.0f / length : 0.0f;
    }
    for (int64_t i = 0; i < 2 * width; ++i) {
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        // A symbol that is zero keeps the vector.
        float& to = x[i * kWidth + lane];
        to = factors[lane] == 0.0f ? to : factors[lane] * back[i * kWidth + lane];
      }
    }
  }
  Vec total = v::zero();
  for (int64_t r = 0; r < p.rows; ++r) {
    multiply_row(row_at(r), x, width, re, im);
    total = v::fma(re, re, v::fma(im, im, total));
  }
  v::store(sums, total);
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t at = group * p.frequencies + first + lane;
    p.norms[at] = std::sqrt(sums[lane]);
    for (int64_t i = 0; i < 2 * width; ++i) {
      p.vectors[at * 2 * width + i] = x[i * kWidth + lane];
    }
  }
}
