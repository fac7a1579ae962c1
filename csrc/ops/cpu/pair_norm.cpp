// SPDX-License-Identifier: MIT
// Pair norms on the CPU: what is multiplied, from which rows, and what becomes of the products.
#include "ops/pair_norm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "core/element.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "ops/cpu/close_pairs.h"
#include "ops/cpu/product.h"

namespace lmtfast {
namespace {

constexpr int64_t kSumBlock = 256;
constexpr int64_t kRatioBlock = 4096;
constexpr int64_t kWorkPerThread = 1 << 18;  // multiplications, about 10 us
constexpr double kTiny = 1e-30, kHuge = 1e37;

bool is_poor(double left, double both) {
  return !(left >= kClose * both && both >= kTiny && both <= kHuge);
}

template <class W>
struct Kernels {
  ProductTile tile;
  void (*pack_rows)(const W* const*, int64_t, int64_t, const float*, int64_t, float*);
  void (*pack_ratio_rows)(const float* const*, int64_t, int64_t, const float*, int64_t, float*);
  void (*pack_columns)(const W* const*, int64_t, int64_t, int64_t, const float*, int64_t, float*);
  void (*pack_ratio_columns)(const float* const*, int64_t, int64_t, int64_t, const float*, int64_t,
                             float*);
  void (*panel_squares)(const float*, int64_t, int64_t, int64_t, double*);
  double (*distance)(const W*, const W*, int64_t);
  double (*square_from)(const float*, const W*, int64_t);
  bool (*norms_of)(const float*, double, const double*, int64_t, float*);
  double (*ratio_of)(const float*, const float*, int64_t, float*, double*);
  void (*weighted_difference)(double, const W*, const float*, const float*, int64_t, float*);
  void (*add_row)(const W*, int64_t, float*);
  void (*add_floats)(const float*, int64_t, float*);
  void (*add_difference)(double, const W*, const W*, int64_t, double*);
};

namespace baseline {
namespace v = simd::baseline;
#include "ops/cpu/pair_norm_kernels.h"
}  // namespace baseline
#if LMTFAST_X86_CLONES
LMTFAST_TARGET_BEGIN_AVX2
namespace avx2 {
namespace v = simd::avx2;
#include "ops/cpu/pair_norm_kernels.h"
}  // namespace avx2
LMTFAST_TARGET_END
LMTFAST_TARGET_BEGIN_AVX512
namespace avx512 {
namespace v = simd::avx512;
#include "ops/cpu/pair_norm_kernels.h"
}  // namespace avx512
LMTFAST_TARGET_END
#endif

template <class W>
const Kernels<W>& kernels(Isa isa) {
#if LMTFAST_X86_CLONES
  if (isa == Isa::kAvx512) return avx512::kKernels<W>;
  if (isa == Isa::kAvx2) return avx2::kKernels<W>;
#endif
  (void)isa;
  return baseline::kKernels<W>;
}

// The head as the products see it: rows, the row that all are taken relative to, the table's rows.
template <class W>
struct Head {
  const PairNorm<W>& p;
  const Kernels<W>& kernel;
  int64_t threads;
  std::vector<const W*> rows, table;
  std::vector<float> centre;

  Head(const PairNorm<W>& problem, Isa isa)
      : p(problem),
        kernel(kernels<W>(isa)),
        threads(choose_threads(p.num_threads, p.u * p.k * p.d, kWorkPerThread)),
        rows(static_cast<size_t>(p.k)),
        table(static_cast<size_t>(p.u)) {
    for (int64_t j = 0; j < p.k; ++j) rows[j] = p.weight + j * p.weight_stride;
    for (int64_t i = 0; i < p.u; ++i) table[i] = rows[class_of(i)];
  }
  int64_t class_of(int64_t i) const { return p.classes ? p.classes[i] : i; }

  // The mean row, or nearly: what matters is only that sums over all rows become small.
  void centre_on_mean() {
    constexpr int64_t kBlock = 512;
    centre.assign(static_cast<size_t>(p.d), 0.0f);
    parallel_for((p.d + kBlock - 1) / kBlock, threads, [&](int64_t block) {
      const int64_t begin = block * kBlock, end = std::min(begin + kBlock, p.d);
      for (const W* row : rows) kernel.add_row(row + begin, end - begin, &centre[begin]);
      for (int64_t f = begin; f < end; ++f) centre[f] /= static_cast<float>(p.k);
    });
  }
};

template <class W>
void norms_from_differences(const Head<W>& head, float* norms) {
  const auto& p = head.p;
  parallel_for(p.u, head.threads, [&](int64_t i) {
    for (int64_t j = 0; j < p.k; ++j) {
      const bool own = j == head.class_of(i);
      norms[i * p.k + j] =
          own ? 0.0f : static_cast<float>(head.kernel.distance(head.table[i], head.rows[j], p.d));
    }
  });
}

// norms[j, i] = norms[i, j] for i < j, in blocks that stay in the cache.
void mirror(float* norms, int64_t k, int64_t threads) {
  constexpr int64_t kBlock = 64;
  parallel_for((k + kBlock - 1) / kBlock, threads, [&](int64_t task) {
    const int64_t begin = task * kBlock, end = std::min(begin + kBlock, k);
    for (int64_t i = 0; i < end; i += kBlock) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t last = std::min(i + kBlock, j);
        for (int64_t r = i; r < last; ++r) norms[j * k + r] = norms[r * k + j];
      }
    }
  });
}

template <class W>
void norms_from_products(const Head<W>& head, float* norms) {
  const auto& p = head.p;
  const auto& kernel = head.kernel;
  const bool symmetric = p.classes == nullptr;
  std::vector<double> left(static_cast<size_t>(round_up(p.u, kernel.tile.rows)));
  std::vector<double> right(static_cast<size_t>(round_up(p.k, kernel.tile.columns)));
  multiply(
      kernel.tile, p.u, p.k, p.d, head.threads,
      [&](int64_t row, int64_t count, float* to) {
        kernel.pack_rows(&head.table[row], count, kernel.tile.rows, head.centre.data(), p.d, to);
        kernel.panel_squares(to, count, kernel.tile.rows, p.d, &left[row]);
      },
      [&](int64_t column, int64_t count, float* to) {
        kernel.pack_rows(&head.rows[column], count, kernel.tile.columns, head.centre.data(), p.d,
                         to);
        kernel.panel_squares(to, count, kernel.tile.columns, p.d, &right[column]);
      },
      [&](int64_t end) { return symmetric ? std::min(end, p.u) : p.u; },
      [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums,
          int64_t stride) {
        for (int64_t i = row; i < row + rows; ++i) {
          const float* products = sums + (i - row) * stride;
          float* out = norms + i * p.k + column;
          if (kernel.norms_of(products, left[i], &right[column], columns, out)) {
            for (int64_t j = 0; j < columns; ++j) {
              const double both = left[i] + right[column + j];
              if (!is_poor(both - 2.0 * static_cast<double>(products[j]), both)) continue;
              out[j] =
                  static_cast<float>(kernel.distance(head.table[i], head.rows[column + j], p.d));
            }
          }
          const int64_t own = head.class_of(i) - column;
          if (own >= 0 && own < columns) out[own] = 0.0f;
        }
      });
  if (symmetric) mirror(norms, p.k, head.threads);
}

// The table of ratios, those of close pairs left out, with its sums along both axes.
template <class W>
struct Ratios {
  ClosePairs<Head<W>> close;
  std::atomic<bool> apart{false};   // whether there are close pairs
  Buffer<float> values;             // (u, k)
  std::vector<double> row, column;  // (u), (k)
  std::vector<const float*> lines;  // (u)
  std::vector<float> zeros;         // (max of u and k): what packing subtracts

  Ratios(const Head<W>& head, const float* norms, const float* grad)
      : close(head),
        values(std::max<int64_t>(1, head.p.u * head.p.k)),
        row(static_cast<size_t>(head.p.u)),
        column(static_cast<size_t>(head.p.k)),
        lines(static_cast<size_t>(head.p.u)),
        zeros(static_cast<size_t>(std::max(head.p.u, head.p.k))) {
    const int64_t u = head.p.u, k = head.p.k;
    for (int64_t i = 0; i < u; ++i) lines[i] = values.data() + i * k;
    // A task owns a block of columns; what it adds to a row is kept apart, then added in order.
    const int64_t blocks = (k + kRatioBlock - 1) / kRatioBlock;
    std::vector<double> parts(static_cast<size_t>(u * blocks));
    parallel_for(blocks, head.threads, [&](int64_t block) {
      const int64_t begin = block * kRatioBlock, count = std::min(kRatioBlock, k - begin);
      std::vector<float> room;
      for (int64_t i = 0; i < u; ++i) {
        const int64_t at = i * k + begin;
        const float* others = close.others(i, begin, count, norms + at, grad + at, room);
        if (others) apart = true;
        parts[i * blocks + block] = head.kernel.ratio_of(others ? others : grad + at, norms + at,
                                                         count, values.data() + at, &column[begin]);
      }
    });
    for (int64_t i = 0; i < u; ++i) {
      for (int64_t block = 0; block < blocks; ++block) row[i] += parts[i * blocks + block];
    }
  }
};

// Few classes: sums S over all rows of the table, then row j of diag(S 1) W - S W term by term.
template <class W>
void vjp_from_differences(const Head<W>& head, const float* norms, const float* grad,
                          W* grad_weight) {
  const auto& p = head.p;
  std::vector<double> s(static_cast<size_t>(p.k * p.k));
  for (int64_t i = 0; i < p.u; ++i) {
    const int64_t c = head.class_of(i);
    for (int64_t j = 0; j < p.k; ++j) {
      const float norm = norms[i * p.k + j];
      const double ratio = norm == 0.0f ? 0.0 : static_cast<double>(grad[i * p.k + j] / norm);
      s[c * p.k + j] += ratio;
      s[j * p.k + c] += ratio;
    }
  }
  parallel_for(p.k, choose_threads(p.num_threads, p.k * p.k * p.d, kWorkPerThread), [&](int64_t j) {
    std::vector<double> sums(static_cast<size_t>(p.d));
    for (int64_t i = 0; i < p.k; ++i) {
      if (i != j) {
        head.kernel.add_difference(s[j * p.k + i], head.rows[j], head.rows[i], p.d, sums.data());
      }
    }
    for (int64_t f = 0; f < p.d; ++f) {
      narrow(static_cast<float>(sums[f]), grad_weight + j * p.d + f);
    }
  });
}

// Where a row of the gradient is formed: in place, or where it must be narrowed, in `room`.
float* line_of(float* out, float*) { return out; }
float* line_of(uint16_t*, float* room) { return room; }

// Every row: S = A + A^T, and diag(S 1) W - S W is one product.
template <class W>
void vjp_of_all_rows(const Head<W>& head, const float* norms, const float* grad, W* grad_weight) {
  const auto& p = head.p;
  const auto& kernel = head.kernel;
  Ratios<W> ratios(head, norms, grad);
  constexpr int64_t kBlock = 64;
  float* s = ratios.values.data();
  parallel_for((p.k + kBlock - 1) / kBlock, head.threads, [&](int64_t task) {
    const int64_t begin = task * kBlock, end = std::min(begin + kBlock, p.k);
    for (int64_t i = 0; i < end; i += kBlock) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t last = std::min(i + kBlock, j + 1);
        for (int64_t r = i; r < last; ++r) {
          s[j * p.k + r] = s[r * p.k + j] = s[j * p.k + r] + s[r * p.k + j];
        }
      }
    }
  });
  multiply(
      kernel.tile, p.k, p.d, p.k, head.threads,
      [&](int64_t row, int64_t count, float* to) {
        kernel.pack_ratio_columns(ratios.lines.data(), row, count, kernel.tile.rows,
                                  ratios.zeros.data(), p.k, to);
      },
      [&](int64_t column, int64_t count, float* to) {
        kernel.pack_columns(head.rows.data(), column, count, kernel.tile.columns,
                            head.centre.data(), p.k, to);
      },
      [&](int64_t) { return p.k; },
      [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums,
          int64_t stride) {
        float room[kMaxColumns];
        for (int64_t j = row; j < row + rows; ++j) {
          W* out = grad_weight + j * p.d + column;
          float* line = line_of(out, room);
          kernel.weighted_difference(ratios.row[j] + ratios.column[j], head.rows[j] + column,
                                     head.centre.data() + column, sums + (j - row) * stride,
                                     columns, line);
          if (line == room) {
            for (int64_t f = 0; f < columns; ++f) narrow(line[f], out + f);
          }
        }
      });
  if (ratios.apart) ratios.close.add(norms, grad, grad_weight);
}

// Chosen rows: what they send to their own classes, then everything a class receives.
template <class W>
void vjp_of_chosen_rows(const Head<W>& head, const float* norms, const float* grad,
                        W* grad_weight) {
  const auto& p = head.p;
  const auto& kernel = head.kernel;
  const Ratios<W> ratios(head, norms, grad);
  Buffer<float> own(std::max<int64_t>(1, p.u * p.d));
  multiply(
      kernel.tile, p.u, p.d, p.k, head.threads,
      [&](int64_t row, int64_t count, float* to) {
        kernel.pack_ratio_rows(&ratios.lines[row], count, kernel.tile.rows, ratios.zeros.data(),
                               p.k, to);
      },
      [&](int64_t column, int64_t count, float* to) {
        kernel.pack_columns(head.rows.data(), column, count, kernel.tile.columns,
                            head.centre.data(), p.k, to);
      },
      [&](int64_t) { return p.u; },
      [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums,
          int64_t stride) {
        for (int64_t i = row; i < row + rows; ++i) {
          kernel.weighted_difference(ratios.row[i], head.table[i] + column,
                                     head.centre.data() + column, sums + (i - row) * stride,
                                     columns, own.data() + i * p.d + column);
        }
      });
  // The table's rows by class, ascending.
  std::vector<int64_t> begin(static_cast<size_t>(p.k) + 1), of_class(static_cast<size_t>(p.u));
  for (int64_t i = 0; i < p.u; ++i) ++begin[p.classes[i] + 1];
  for (int64_t j = 0; j < p.k; ++j) begin[j + 1] += begin[j];
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < p.u; ++i) of_class[next[p.classes[i]]++] = i;
  multiply(
      kernel.tile, p.k, p.d, p.u, head.threads,
      [&](int64_t row, int64_t count, float* to) {
        kernel.pack_ratio_columns(ratios.lines.data(), row, count, kernel.tile.rows,
                                  ratios.zeros.data(), p.u, to);
      },
      [&](int64_t column, int64_t count, float* to) {
        kernel.pack_columns(head.table.data(), column, count, kernel.tile.columns,
                            head.centre.data(), p.u, to);
      },
      [&](int64_t) { return p.k; },
      [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const float* sums,
          int64_t stride) {
        float room[kMaxColumns];
        for (int64_t j = row; j < row + rows; ++j) {
          W* out = grad_weight + j * p.d + column;
          float* line = line_of(out, room);
          kernel.weighted_difference(ratios.column[j], head.rows[j] + column,
                                     head.centre.data() + column, sums + (j - row) * stride,
                                     columns, line);
          for (int64_t i = begin[j]; i < begin[j + 1]; ++i) {
            kernel.add_floats(own.data() + of_class[i] * p.d + column, columns, line);
          }
          if (line == room) {
            for (int64_t f = 0; f < columns; ++f) narrow(line[f], out + f);
          }
        }
      });
  if (ratios.apart) ratios.close.add(norms, grad, grad_weight);
}

}  // namespace

template <class W>
void validate(const PairNorm<W>& p) {
  require(p.k >= 0, "k >= 0", p.k, "k");
  require(p.d >= 0, "d >= 0", p.d, "d");
  require(p.u >= 0, "u >= 0", p.u, "u");
  require(p.num_threads >= 0, "num_threads >= 0", p.num_threads, "num_threads");
  require(p.classes || p.u == p.k || p.u == 0, "u = k without classes", p.u, "u");
  require(p.k <= 1 || p.weight_stride >= p.d, "weight_stride >= d", p.weight_stride,
          "weight_stride");
  require(p.weight || p.k == 0 || p.d == 0, "a non-null pointer", 0, "weight");
  for (int64_t i = 0; p.classes && i < p.u; ++i) {
    if (p.classes[i] < 0 || p.classes[i] >= p.k) {
      throw_invalid("values in [0, " + std::to_string(p.k) + ")", p.classes[i],
                    "classes[" + std::to_string(i) + "]");
    }
  }
}

namespace cpu {

template <class W>
void pair_norm_forward(const PairNorm<W>& problem, float* norms, Isa isa) {
  if (problem.u == 0 || problem.k == 0) return;
  Head<W> head(problem, isa);
  if (problem.k <= kExactClasses || problem.d == 0) return norms_from_differences(head, norms);
  // Of integers the differences to a row are integers; those to the mean are not.
  for (int64_t f = 0; f < problem.d; ++f) head.centre.push_back(widen(problem.weight[f]));
  norms_from_products(head, norms);
}

template <class W>
void pair_norm_vjp(const PairNorm<W>& problem, const float* norms, const float* grad,
                   W* grad_weight, Isa isa) {
  if (problem.k == 0 || problem.d == 0) return;
  if (problem.u == 0) {
    std::fill(grad_weight, grad_weight + problem.k * problem.d, W(0));
    return;
  }
  Head<W> head(problem, isa);
  if (problem.k <= kExactClasses) return vjp_from_differences(head, norms, grad, grad_weight);
  head.centre_on_mean();
  if (problem.classes == nullptr) return vjp_of_all_rows(head, norms, grad, grad_weight);
  vjp_of_chosen_rows(head, norms, grad, grad_weight);
}

}  // namespace cpu

#define LMTFAST_INSTANTIATE(W)                                           \
  template void validate(const PairNorm<W>&);                            \
  template void cpu::pair_norm_forward(const PairNorm<W>&, float*, Isa); \
  template void cpu::pair_norm_vjp(const PairNorm<W>&, const float*, const float*, W*, Isa);
LMTFAST_INSTANTIATE(float)
LMTFAST_INSTANTIATE(uint16_t)

}  // namespace lmtfast
