// SPDX-License-Identifier: MIT
// Included behind separable_passes.h: dense products in register tiles, orthonormal bases, and loops
// over entries.

// Rows and vectors of a register tile of the dense products.
constexpr int kTileHeight = 4;
constexpr int kTileVectors = v::kWidth == 16 ? 5 : 3;

// kHeight rows of x against kVectors vectors of b's columns; `x_along` and `x_between` are the steps
// of x along the sum and between the rows of z.
template <int kHeight, int kVectors>
void product_tile(int64_t depth, const float* x, int64_t x_along, int64_t x_between, const float* b,
                  int64_t b_stride, float* z, int64_t z_stride, bool add) {
  Vec sum[kHeight][kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = v::zero();
  }
  for (int64_t q = 0; q < depth; ++q, b += b_stride, x += x_along) {
    Vec right[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) right[j] = v::load(b + j * v::kWidth);
#pragma GCC unroll 4
    for (int i = 0; i < kHeight; ++i) {
      const Vec left = v::broadcast(x[i * x_between]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = v::fma(left, right[j], sum[i][j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* to = z + i * z_stride + j * v::kWidth;
      v::store(to, add ? sum[i][j] + v::load(to) : sum[i][j]);
    }
  }
}

using ProductTile = void (*)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*,
                             int64_t, bool);

template <size_t... kVectors>
ProductTile product_tile_of(int64_t height, int64_t vectors, std::index_sequence<kVectors...>) {
  static constexpr ProductTile all[][kTileVectors] = {{product_tile<1, kVectors + 1>...},
                                                      {product_tile<kTileHeight, kVectors + 1>...}};
  return all[height > 1][vectors - 1];
}

// Columns [first, width) of the rows of z that the tile of `height` starts.
void product_rows(int64_t height, int64_t depth, const float* x, int64_t x_along, int64_t x_between,
                  const float* b, int64_t width, int64_t first, float* z, bool add) {
  for (int64_t j = first; j < width; j += kTileVectors * v::kWidth) {
    const int64_t left = (width - j) / v::kWidth;
    const int64_t vectors = left < kTileVectors ? left : kTileVectors;
    product_tile_of(height, vectors, std::make_index_sequence<kTileVectors>())(
        depth, x, x_along, x_between, b + j, width, z + j, width, add);
  }
}

void multiply(int64_t rows, int64_t depth, int64_t width, const float* x, const float* b,
              float* z) {
  int64_t i = 0;
  for (; i + kTileHeight <= rows; i += kTileHeight) {
    product_rows(kTileHeight, depth, x + i * width, 1, width, b, width, 0, z + i * width, false);
  }
  for (; i < rows; ++i) {
    product_rows(1, depth, x + i * width, 1, width, b, width, 0, z + i * width, false);
  }
}

void square(int64_t rows, int64_t depth, int64_t width, const float* x, float* g) {
  for (int64_t i = 0; i < depth; i += kTileHeight) {
    const int64_t height = depth - i < kTileHeight ? 1 : kTileHeight;
    const int64_t end = height == 1 ? depth : i + 1;
    for (int64_t k = i; k < end; ++k) {
      product_rows(height, rows, x + k, width, 1, x, width, k / v::kWidth * v::kWidth,
                   g + k * width, true);
    }
  }
}

double dot(int64_t size, const float* x, const float* z) {
  Vec sum[4] = {v::zero(), v::zero(), v::zero(), v::zero()};
  int64_t i = 0;
  for (; i + 4 * v::kWidth <= size; i += 4 * v::kWidth) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      sum[j] = v::fma(v::load(x + i + j * v::kWidth), v::load(z + i + j * v::kWidth), sum[j]);
    }
  }
  float lanes[4][v::kWidth];
  for (int j = 0; j < 4; ++j) v::store(lanes[j], sum[j]);
  double total = 0.0;
  for (int j = 0; j < 4; ++j) {
    for (int l = 0; l < v::kWidth; ++l) total += static_cast<double>(lanes[j][l]);
  }
  for (; i < size; ++i) total += static_cast<double>(x[i]) * static_cast<double>(z[i]);
  return total;
}

// Applies I - tau w w^T to the columns past `pivot`; w is one at the pivot and x's pivot column
// below it.
template <int kLaneCount>
void reflect(int64_t rows, int64_t pivot, double tau, double* x) {
  double s[kLaneCount];
  for (int k = 0; k < kLaneCount; ++k) s[k] = x[pivot * kLaneCount + k];
  for (int64_t i = pivot + 1; i < rows; ++i) {
    const double w = x[i * kLaneCount + pivot];
#pragma omp simd
    for (int k = 0; k < kLaneCount; ++k) s[k] += w * x[i * kLaneCount + k];
  }
  for (int k = 0; k < kLaneCount; ++k) s[k] = k > pivot ? s[k] * tau : 0.0;
  for (int k = 0; k < kLaneCount; ++k) x[pivot * kLaneCount + k] -= s[k];
  for (int64_t i = pivot + 1; i < rows; ++i) {
    const double w = x[i * kLaneCount + pivot];
#pragma omp simd
    for (int k = 0; k < kLaneCount; ++k) x[i * kLaneCount + k] -= w * s[k];
  }
}

template <int kLaneCount>
void orthonormalise_lanes(int64_t rows, int64_t rank, double* x, double* triangle) {
  double tau[kLaneCount];
  for (int64_t j = 0; j < rank; ++j) {
    double below = 0.0;
#pragma omp simd reduction(+ : below)
    for (int64_t i = j + 1; i < rows; ++i) {
      below += x[i * kLaneCount + j] * x[i * kLaneCount + j];
    }
    double& head = x[j * kLaneCount + j];
    tau[j] = 0.0;
    if (below != 0.0) {
      const double alpha = head, beta = -std::copysign(std::sqrt(alpha * alpha + below), alpha);
      tau[j] = (beta - alpha) / beta;
      const double inverse = 1.0 / (alpha - beta);
      for (int64_t i = j + 1; i < rows; ++i) x[i * kLaneCount + j] *= inverse;
      head = beta;
    }
    reflect<kLaneCount>(rows, j, tau[j], x);
  }
  for (int64_t j = 0; j < kLaneCount; ++j) {
    for (int64_t k = 0; k < kLaneCount; ++k) {
      triangle[j * kLaneCount + k] = j >= rank || k < j ? 0.0 : x[j * kLaneCount + k];
    }
  }
  // From the last reflection to the first, on the columns of the identity that it changes.
  for (int64_t j = rank - 1; j >= 0; --j) {
    for (int64_t k = j; k < kLaneCount; ++k) x[j * kLaneCount + k] = 0.0;
    reflect<kLaneCount>(rows, j, tau[j], x);
    x[j * kLaneCount + j] = 1.0 - tau[j];
    for (int64_t i = j + 1; i < rows; ++i) x[i * kLaneCount + j] *= -tau[j];
  }
}

void orthonormalise(int64_t rows, int64_t rank, int64_t lanes, double* x, double* triangle) {
  if (lanes == 8) return orthonormalise_lanes<8>(rows, rank, x, triangle);
  if (lanes == 4) return orthonormalise_lanes<4>(rows, rank, x, triangle);
  orthonormalise_lanes<1>(rows, rank, x, triangle);
}

template <int kLaneCount>
void turn_lanes(int64_t rows, const double* triangle, double* x) {
  double columns[kLaneCount][kLaneCount];
  for (int j = 0; j < kLaneCount; ++j) {
    for (int k = 0; k < kLaneCount; ++k) columns[j][k] = triangle[k * kLaneCount + j];
  }
  for (int64_t i = 0; i < rows; ++i, x += kLaneCount) {
    double sum[kLaneCount] = {};
    for (int j = 0; j < kLaneCount; ++j) {
#pragma omp simd
      for (int k = 0; k < kLaneCount; ++k) sum[k] += x[j] * columns[j][k];
    }
    for (int k = 0; k < kLaneCount; ++k) x[k] = sum[k];
  }
}

void turn(int64_t rows, int64_t lanes, const double* triangle, double* x) {
  if (lanes == 8) return turn_lanes<8>(rows, triangle, x);
  if (lanes == 4) return turn_lanes<4>(rows, triangle, x);
  turn_lanes<1>(rows, triangle, x);
}

// x = factor * x, rounded once.
void rescale(int64_t size, double factor, float* x) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) x[i] = static_cast<float>(static_cast<double>(x[i]) * factor);
}

float largest(int64_t size, const float* x) {
  float found = 0.0f, poison = 0.0f;
#pragma omp simd reduction(max : found) reduction(+ : poison)
  for (int64_t i = 0; i < size; ++i) {
    const float entry = std::abs(x[i]);
    found = entry > found ? entry : found;
    poison += entry * 0.0f;
  }
  return found + poison;
}

template <int kLaneCount>
void add_terms(int64_t count, const float* const* terms, float* to) {
  using U = typename UnitOf<kLaneCount>::Type;
  constexpr int kParts = kLaneCount / U::kWidth;
  typename U::Vec sum[kParts];
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) sum[p] = U::zero();
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) sum[p] = sum[p] + U::load(terms[i] + p * U::kWidth);
  }
#pragma GCC unroll 8
  for (int p = 0; p < kParts; ++p) U::store(to + p * U::kWidth, sum[p]);
}

void add(int64_t count, const float* const* terms, int64_t lanes, float* to) {
  if (lanes == 8) return add_terms<8>(count, terms, to);
  if (lanes == 4) return add_terms<4>(count, terms, to);
  add_terms<1>(count, terms, to);
}
