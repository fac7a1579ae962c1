// SPDX-License-Identifier: MIT
// Included once per instruction set, inside its namespace and target region, with `v` naming the
// vectors of core/simd.h: what the pair norms do with a row, a panel or a tile.
//
// The left factor of a product lies in panels (depth, kTileRows), the right one in panels (depth,
// kPanel); entries past the end of a matrix are zero.

using Vec = v::Vec;
constexpr int64_t kWidth = v::kWidth;
constexpr int64_t kTileRows = v::kTileRows;
constexpr int64_t kPanel = 2 * kWidth;

// sums (kTileRows, kPanel) += A B over `depth`. `next` is the left panel that follows, to be
// fetched meanwhile: panels are as long as a page, where the hardware stops fetching ahead.
inline void accumulate(int64_t depth, const float* a, const float* b, float* sums, int64_t stride,
                       const float* next) {
  Vec s[kTileRows][2];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTileRows; ++i) {
    s[i][0] = v::load(sums + i * stride);
    s[i][1] = v::load(sums + i * stride + kWidth);
  }
  for (int64_t p = 0; p < depth; ++p, a += kTileRows, b += kPanel, next += kTileRows) {
    const Vec left = v::load(b), right = v::load(b + kWidth);
    __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTileRows; ++i) {
      const Vec x = v::broadcast(a[i]);
      s[i][0] = v::fma(x, left, s[i][0]);
      s[i][1] = v::fma(x, right, s[i][1]);
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kTileRows; ++i) {
    v::store(sums + i * stride, s[i][0]);
    v::store(sums + i * stride + kWidth, s[i][1]);
  }
}

template <class W>
LMTFAST_INLINE Vec load_some(const W* from, int64_t count) {
  return count == kWidth ? v::load(from) : v::load_part(from, count);
}

LMTFAST_INLINE void store_some(float* to, Vec x, int64_t count) {
  if (count == kWidth) return v::store(to, x);
  v::store_part(to, x, count);
}

// Packs `count` rows of a matrix, `depth` long, as the columns of panels of `width`: panel q is
// to[(q * depth + p) * width + i] = lines[q * width + i][p] - centre[p], zero past the last row.
template <class W>
void pack_rows(const W* const* lines, int64_t count, int64_t width, const float* centre,
               int64_t depth, float* to) {
  alignas(64) float rows[kWidth * kWidth] = {}, columns[kWidth * kWidth];
  for (int64_t panel = 0; panel < count; panel += width, to += width * depth) {
    for (int64_t first = 0; first < width; first += kWidth) {
      const int64_t lanes = std::min(width - first, kWidth);
      const int64_t used = std::clamp<int64_t>(count - panel - first, 0, lanes);
      if (used < kWidth) std::fill(rows + used * kWidth, rows + kWidth * kWidth, 0.0f);
      for (int64_t p = 0; p < depth; p += kWidth) {
        const int64_t here = std::min(depth - p, kWidth);
        const Vec shift = load_some(centre + p, here);
        for (int64_t i = 0; i < used; ++i) {
          const W* line = lines[panel + first + i];
          v::store(rows + i * kWidth, load_some(line + p, here) - shift);
        }
        v::transpose(rows, kWidth, columns, kWidth);
        for (int64_t q = 0; q < here; ++q) {
          store_some(to + (p + q) * width + first, v::load(columns + q * kWidth), lanes);
        }
      }
    }
  }
}

// Packs the columns [first, first + count) of a matrix of `depth` rows in panels of `width`: panel q
// is to[(q * depth + p) * width + i] = lines[p][j] - centre[j] for j = first + q * width + i, zero
// past the last column. Row by row over all panels, for each row may be a page of its own.
template <class W>
void pack_columns(const W* const* lines, int64_t first, int64_t count, int64_t width,
                  const float* centre, int64_t depth, float* to) {
  for (int64_t p = 0; p < depth; ++p) {
    const W* line = lines[p] + first;
    for (int64_t panel = 0; panel < count; panel += width) {
      float* packed = to + panel * depth + p * width;
      for (int64_t i = 0; i < width; i += kWidth) {
        const int64_t lanes = std::min(width - i, kWidth);
        const int64_t used = std::clamp<int64_t>(count - panel - i, 0, lanes);
        const int64_t j = panel + i;
        const Vec x =
            used > 0 ? load_some(line + j, used) - load_some(centre + first + j, used) : v::zero();
        store_some(packed + i, x, lanes);
      }
    }
  }
}

// Sums of squares of the columns of packed panels, in double over blocks of float.
inline void panel_squares(const float* panel, int64_t count, int64_t width, int64_t depth,
                          double* squares) {
  float block[64];
  std::fill(squares, squares + count, 0.0);
  for (; count > 0; count -= width, panel += width * depth, squares += width) {
    const int64_t used = std::min(count, width);
    for (int64_t begin = 0; begin < depth; begin += kSumBlock) {
      const int64_t end = std::min(begin + kSumBlock, depth);
      std::fill(block, block + width, 0.0f);
      for (int64_t p = begin; p < end; ++p) {
        const float* x = panel + p * width;
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) block[i] += x[i] * x[i];
      }
      for (int64_t i = 0; i < used; ++i) squares[i] += static_cast<double>(block[i]);
    }
  }
}

// ||a - b|| from differences, in double: squares of floats neither overflow nor vanish there.
template <class W>
double distance(const W* a, const W* b, int64_t d) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t p = 0; p < d; ++p) {
    const double x = static_cast<double>(widen(a[p])) - static_cast<double>(widen(b[p]));
    total += x * x;
  }
  return std::sqrt(total);
}

template <class W>
double square_from(const float* centre, const W* a, int64_t d) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t p = 0; p < d; ++p) {
    const double x = static_cast<double>(widen(a[p]) - centre[p]);
    total += x * x;
  }
  return total;
}

// norms[j] from the products with row j. True if some need another way: too much is lost to
// cancellation, or squares are out of the range of float, or NaN.
inline bool norms_of(const float* products, double square, const double* squares, int64_t n,
                     float* norms) {
  int64_t poor = 0;
#pragma omp simd reduction(+ : poor)
  for (int64_t j = 0; j < n; ++j) {
    const double both = square + squares[j];
    const double left = both - 2.0 * static_cast<double>(products[j]);
    poor += is_poor(left, both) ? 1 : 0;
    norms[j] = std::sqrt(static_cast<float>(left));
  }
  return poor > 0;
}

// ratio = grad / norms, 0 at distance 0; its sum is added to `column`, entry by entry, and returned.
inline double ratio_of(const float* grad, const float* norms, int64_t n, float* ratio,
                       double* column) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    const float quotient = norms[j] == 0.0f ? 0.0f : grad[j] / norms[j];
    ratio[j] = quotient;
    column[j] += static_cast<double>(quotient);
    total += static_cast<double>(quotient);
  }
  return total;
}

// to[j] = factor * (row[j] - centre[j]) - products[j]
template <class W>
void weighted_difference(double factor, const W* row, const float* centre, const float* products,
                         int64_t n, float* to) {
  const Vec f = v::broadcast(static_cast<float>(factor));
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t here = std::min(n - j, kWidth);
    const Vec x = load_some(row + j, here) - load_some(centre + j, here);
    store_some(to + j, f * x - load_some(products + j, here), here);
  }
}

// to[j] += x[j]
template <class W>
void add_row(const W* x, int64_t n, float* to) {
  for (int64_t j = 0; j < n; j += kWidth) {
    const int64_t here = std::min(n - j, kWidth);
    store_some(to + j, load_some(to + j, here) + load_some(x + j, here), here);
  }
}

// sums[p] += factor * (a[p] - b[p])
template <class W>
void add_difference(double factor, const W* a, const W* b, int64_t d, double* sums) {
  alignas(64) float difference[kWidth];
  for (int64_t p = 0; p < d; p += kWidth) {
    const int64_t here = std::min(d - p, kWidth);
    v::store(difference, load_some(a + p, here) - load_some(b + p, here));
#pragma omp simd
    for (int64_t i = 0; i < here; ++i) sums[p + i] += factor * static_cast<double>(difference[i]);
  }
}

template <class W>
constexpr Kernels<W> kKernels{{kTileRows, kPanel, accumulate},
                              pack_rows<W>,
                              pack_rows<float>,
                              pack_columns<W>,
                              pack_columns<float>,
                              panel_squares,
                              distance<W>,
                              square_from<W>,
                              norms_of,
                              ratio_of,
                              weighted_difference<W>,
                              add_row<W>,
                              add_row<float>,
                              add_difference<W>};
