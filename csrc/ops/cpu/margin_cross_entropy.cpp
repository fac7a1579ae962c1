// SPDX-License-Identifier: MIT
// Margin cross-entropy on the CPU. Definition and saved tensors: ops/margin_cross_entropy.h.
// Layout: row-major rows of K, unit column stride. One task is a block of rows (forward) or of
// pair-norm rows (backward). Accumulates: exponentials in T over blocks of 256, everything wider in
// double; pair-norm gradients in double. Compiled with -ffp-contract=off: forward and backward must
// see the same A_j and the same arg-max on every target.
#include "ops/margin_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/parallel.h"
#include "core/vector_math.h"

namespace lmtfast {
namespace {

// Hu et al. 2024: the smallest per-class ratio.
constexpr double kEmmaMinRatio = 0.01;
// Elements a thread must have to pay for waking it (about 10 us of work).
constexpr int64_t kElementsPerThread = 8192;
constexpr int32_t kSumBlock = 256;

template <class T>
struct Row {
  const T* z;
  const T* b;
  T c;
  int32_t t, k;
};

template <class T>
LMTFAST_INLINE Row<T> row_of(const MarginCrossEntropy<T>& p, int64_t i) {
  return {p.logits + i * p.logits_stride, p.rows + p.row_index[i] * p.rows_stride, p.coefficient[i],
          static_cast<int32_t>(p.target[i]), static_cast<int32_t>(p.k)};
}

// NaN never wins a comparison below. That hides nothing: every NaN still reaches the sum of
// exponentials.
template <class T>
LMTFAST_INLINE T row_max(const T* x, int32_t k) {
  T m = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : m)
  for (int32_t j = 0; j < k; ++j) m = x[j] > m ? x[j] : m;
  return m;
}

// LMT++: the one factor that keeps a correct prediction correct, and leaves a wrong one alone.
template <class T>
LMTFAST_INLINE T sample_factor(const Row<T>& row) {
  const T zt = row.z[row.t];
  T a = 1;
#pragma omp simd reduction(min : a)
  for (int32_t j = 0; j < row.k; ++j) {
    const T margin = zt - row.z[j];
    const T addition = j == row.t ? T(0) : row.c * row.b[j];
    T f = margin / addition;
    f = margin >= addition ? T(1) : f;
    f = margin <= T(0) ? T(0) : f;
    f = j == row.t ? T(1) : f;
    a = f < a ? f : a;
  }
  return a;
}

template <class T>
LMTFAST_INLINE T class_ratio(T margin, T addition) {
  T s = margin / addition;
  s = s < T(kEmmaMinRatio) ? T(kEmmaMinRatio) : s;
  s = s > T(1) ? T(1) : s;
  return addition == T(0) ? T(1) : s;
}

// y = exp(y - m) with 0 at `skip`; returns the sum.
template <bool kFma, class T>
LMTFAST_INLINE double exponentials(const T* x, T* y, int32_t k, int32_t skip, T m) {
  double total = 0;
  for (int32_t begin = 0; begin < k; begin += kSumBlock) {
    const int32_t end = k - begin < kSumBlock ? k : begin + kSumBlock;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int32_t j = begin; j < end; ++j) {
      const T e = exp_nonpositive<kFma>(x[j] - m);
      const T kept = j == skip ? T(0) : e;
      y[j] = kept;
      sum += kept;
    }
    total += static_cast<double>(sum);
  }
  return total;
}

template <class T>
LMTFAST_INLINE void multiply(T* y, int32_t k, T factor) {
#pragma omp simd
  for (int32_t j = 0; j < k; ++j) y[j] *= factor;
}

// Cross-entropy from the sum over the rivals and the target's own exponential; accurate when the
// loss is small.
template <class T>
LMTFAST_INLINE double loss_of(T m, T yt, double rivals, double own) {
  return (static_cast<double>(m) - static_cast<double>(yt)) + std::log1p(rivals + (own - 1.0));
}

template <bool kFma, class T>
LMTFAST_INLINE void forward_row(lmtfast_margin_member member, const Row<T>& row, T* loss, T* dz,
                                T* scale) {
  const T zt = row.z[row.t];
  T m = -std::numeric_limits<T>::infinity();
  T a = 1;
  if (member == LMTFAST_EMMA) {
#pragma omp simd reduction(max : m)
    for (int32_t j = 0; j < row.k; ++j) {
      const T addition = j == row.t ? T(0) : row.c * row.b[j];
      const T y = row.z[j] + class_ratio(zt - row.z[j], addition) * addition;
      dz[j] = y;
      m = y > m ? y : m;
    }
  } else {
    if (member == LMTFAST_LMTPP) a = sample_factor(row);
#pragma omp simd reduction(max : m)
    for (int32_t j = 0; j < row.k; ++j) {
      const T addition = j == row.t ? T(0) : row.c * row.b[j];
      const T y = row.z[j] + a * addition;
      dz[j] = y;
      m = y > m ? y : m;
    }
  }
  const double rivals = exponentials<kFma>(dz, dz, row.k, row.t, m);
  const double own = static_cast<double>(exp_nonpositive<kFma>(zt - m));
  const double inverse = 1.0 / (rivals + own);
  multiply(dz, row.k, static_cast<T>(inverse));
  // p_t - 1 would cancel.
  dz[row.t] = static_cast<T>(-rivals * inverse);
  *loss = static_cast<T>(loss_of(m, zt, rivals, own));
  *scale = a;
}

// GloRo's extra class: its logit and the class that attains it (-1: no rival).
template <class T>
struct Bottom {
  T logit;
  int32_t index;
};

template <class T>
LMTFAST_INLINE int32_t first_equal(const T* x, int32_t k, T value) {
  for (int32_t j = 0; j < k; ++j) {
    if (x[j] == value) return j;
  }
  return 0;
}

template <class T>
LMTFAST_INLINE Bottom<T> bottom_of(const Row<T>& row, T highest) {
  const int32_t r = first_equal(row.z, row.k, highest);
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  T logit = kLowest;
  T poisoned = 0;
#pragma omp simd reduction(max : logit, poisoned)
  for (int32_t j = 0; j < row.k; ++j) {
    T y = row.z[j] + row.c * row.b[j];
    y = j == r ? kLowest : y;
    logit = y > logit ? y : logit;
    poisoned = y != y ? T(1) : poisoned;
  }
  int32_t index = -1;
  for (int32_t j = 0; j < row.k && index < 0; ++j) {
    if (j != r && row.z[j] + row.c * row.b[j] == logit) index = j;
  }
  // A maximum skips NaN, and this one is all that the loss sees of the additions.
  return {poisoned > 0 ? std::numeric_limits<T>::quiet_NaN() : logit, index};
}

template <bool kFma, class T>
LMTFAST_INLINE void forward_row_gloro(const Row<T>& row, T* loss, T* dz, T* scale) {
  const T zt = row.z[row.t];
  const T highest = row_max(row.z, row.k);
  const Bottom<T> bottom = bottom_of(row, highest);
  const T m = bottom.logit > highest ? bottom.logit : highest;
  const double rivals = exponentials<kFma>(row.z, dz, row.k, row.t, m);
  const double own = static_cast<double>(exp_nonpositive<kFma>(zt - m));
  const double extra = static_cast<double>(exp_nonpositive<kFma>(bottom.logit - m));
  const double inverse = 1.0 / (rivals + extra + own);
  multiply(dz, row.k, static_cast<T>(inverse));
  dz[row.t] = static_cast<T>(-(bottom.index == row.t ? rivals : rivals + extra) * inverse);
  if (bottom.index >= 0 && bottom.index != row.t)
    dz[bottom.index] += static_cast<T>(extra * inverse);
  *loss = static_cast<T>(loss_of(m, zt, rivals + extra, own));
  *scale = static_cast<T>(extra * inverse);
}

template <bool kFma, class T>
LMTFAST_INLINE void forward_rows(const MarginCrossEntropy<T>& p, T* loss, T* dlogits, T* scale,
                                 int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Row<T> row = row_of(p, i);
    if (p.member == LMTFAST_GLORO) {
      forward_row_gloro<kFma>(row, loss + i, dlogits + i * p.k, scale + i);
    } else {
      forward_row<kFma>(p.member, row, loss + i, dlogits + i * p.k, scale + i);
    }
  }
}

// Adds row i's share to `gathered` (double, length k) and writes its two other gradients.
template <class T>
LMTFAST_INLINE T backward_row(lmtfast_margin_member member, const Row<T>& row, T g, T scale,
                              const T* dz, T* gz, double* gathered) {
  double total = 0;
  const double gc = static_cast<double>(g) * static_cast<double>(row.c);
  if (member == LMTFAST_GLORO) {
    const Bottom<T> bottom = bottom_of(row, row_max(row.z, row.k));
    if (bottom.index >= 0) {
      gathered[bottom.index] += gc * static_cast<double>(scale);
      total = static_cast<double>(scale) * static_cast<double>(row.b[bottom.index]);
    }
  } else if (member == LMTFAST_EMMA) {
    const T zt = row.z[row.t];
#pragma omp simd reduction(+ : total)
    for (int32_t j = 0; j < row.k; ++j) {
      const T s = class_ratio(zt - row.z[j], row.c * row.b[j]);
      const double share = static_cast<double>(j == row.t ? T(0) : s * dz[j]);
      gathered[j] += gc * share;
      total += share * static_cast<double>(row.b[j]);
    }
  } else {
    const double factor = gc * static_cast<double>(scale);
#pragma omp simd reduction(+ : total)
    for (int32_t j = 0; j < row.k; ++j) {
      const double share = static_cast<double>(j == row.t ? T(0) : dz[j]);
      gathered[j] += factor * share;
      total += share * static_cast<double>(row.b[j]);
    }
    total *= static_cast<double>(scale);
  }
#pragma omp simd
  for (int32_t j = 0; j < row.k; ++j) gz[j] = g * dz[j];
  return static_cast<T>(static_cast<double>(g) * total);
}

// Samples sorted by pair-norm row: one owner per row, so neither atomics nor an order that depends
// on threads.
struct Groups {
  std::vector<int64_t> begin;   // (u + 1)
  std::vector<int64_t> sample;  // (n), ascending within a group

  Groups(const int64_t* row_index, int64_t n, int64_t u)
      : begin(static_cast<size_t>(u) + 1, 0), sample(static_cast<size_t>(n)) {
    for (int64_t i = 0; i < n; ++i) ++begin[row_index[i] + 1];
    for (int64_t r = 0; r < u; ++r) begin[r + 1] += begin[r];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < n; ++i) sample[next[row_index[i]]++] = i;
  }
};

template <class T>
struct Backward {
  const T *grad_loss, *dlogits, *scale;
  T *grad_logits, *grad_rows, *grad_coefficient;
};

template <class T>
LMTFAST_INLINE void backward_groups(const MarginCrossEntropy<T>& p, const Backward<T>& buffers,
                                    const int64_t* begin, const int64_t* sample, int64_t first,
                                    int64_t last, double* gathered) {
  for (int64_t r = first; r < last; ++r) {
    T* out = buffers.grad_rows + r * p.k;
    for (int64_t j = 0; j < p.k; ++j) gathered[j] = 0;
    for (int64_t s = begin[r]; s < begin[r + 1]; ++s) {
      const int64_t i = sample[s];
      buffers.grad_coefficient[i] =
          backward_row(p.member, row_of(p, i), buffers.grad_loss[i], buffers.scale[i],
                       buffers.dlogits + i * p.k, buffers.grad_logits + i * p.k, gathered);
    }
    for (int64_t j = 0; j < p.k; ++j) out[j] = static_cast<T>(gathered[j]);
  }
}

template <class T>
struct Kernels {
  void (*forward)(const MarginCrossEntropy<T>&, T*, T*, T*, int64_t, int64_t);
  void (*backward)(const MarginCrossEntropy<T>&, const Backward<T>&, const int64_t*, const int64_t*,
                   int64_t, int64_t, double*);
};

// The bodies above are inlined into one pair of functions per instruction set; lambdas would lose
// the target attribute.
#define LMTFAST_KERNELS(name, attributes, fma)                                                  \
  template <class T>                                                                            \
  attributes void forward_##name(const MarginCrossEntropy<T>& p, T* loss, T* dlogits, T* scale, \
                                 int64_t begin, int64_t end) {                                  \
    forward_rows<fma>(p, loss, dlogits, scale, begin, end);                                     \
  }                                                                                             \
  template <class T>                                                                            \
  attributes void backward_##name(const MarginCrossEntropy<T>& p, const Backward<T>& buffers,   \
                                  const int64_t* begin, const int64_t* sample, int64_t first,   \
                                  int64_t last, double* gathered) {                             \
    backward_groups(p, buffers, begin, sample, first, last, gathered);                          \
  }                                                                                             \
  template <class T>                                                                            \
  constexpr Kernels<T> k##name{forward_##name<T>, backward_##name<T>};

#if defined(__FMA__) || defined(__aarch64__)
LMTFAST_KERNELS(baseline, , true)
#else
LMTFAST_KERNELS(baseline, , false)
#endif
#if LMTFAST_X86_CLONES
LMTFAST_KERNELS(avx2, __attribute__((target("avx2,fma"))), true)
LMTFAST_KERNELS(avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma"))), true)
#endif

template <class T>
const Kernels<T>& kernels(Isa isa) {
#if LMTFAST_X86_CLONES
  if (isa == Isa::kAvx512) return kavx512<T>;
  if (isa == Isa::kAvx2) return kavx2<T>;
#endif
  (void)isa;
  return kbaseline<T>;
}

void require_indices(const int64_t* index, int64_t n, int64_t limit, const char* name) {
  for (int64_t i = 0; i < n; ++i) {
    if (index[i] < 0 || index[i] >= limit) {
      throw_invalid("values in [0, " + std::to_string(limit) + ")", index[i],
                    std::string(name) + "[" + std::to_string(i) + "]");
    }
  }
}

}  // namespace

template <class T>
void validate(const MarginCrossEntropy<T>& p) {
  require(p.n >= 0, "n >= 0", p.n, "n");
  require(p.k >= 1 && p.k <= std::numeric_limits<int32_t>::max(), "1 <= k < 2^31", p.k, "k");
  require(p.u >= 0, "u >= 0", p.u, "u");
  require(p.num_threads >= 0, "num_threads >= 0", p.num_threads, "num_threads");
  require(p.n <= 1 || p.logits_stride >= p.k, "logits_stride >= k", p.logits_stride,
          "logits_stride");
  require(p.u <= 1 || p.rows_stride >= p.k, "rows_stride >= k", p.rows_stride, "rows_stride");
  if (p.n == 0) return;
  require(p.logits && p.target && p.row_index && p.rows && p.coefficient, "non-null inputs", 0,
          "inputs");
  require_indices(p.target, p.n, p.k, "target");
  require_indices(p.row_index, p.n, p.u, "row_index");
}

template void validate(const MarginCrossEntropy<float>&);
template void validate(const MarginCrossEntropy<double>&);

namespace cpu {

template <class T>
void margin_cross_entropy_forward(const MarginCrossEntropy<T>& p, T* loss, T* dlogits, T* scale,
                                  Isa isa) {
  const int64_t threads = choose_threads(p.num_threads, p.n * p.k, kElementsPerThread);
  const auto forward = kernels<T>(isa).forward;
  const int64_t tasks = std::min(threads, p.n);
  parallel_for(tasks, threads, [&](int64_t task) {
    forward(p, loss, dlogits, scale, p.n * task / tasks, p.n * (task + 1) / tasks);
  });
}

template <class T>
void margin_cross_entropy_backward(const MarginCrossEntropy<T>& p, const T* grad_loss,
                                   const T* dlogits, const T* scale, T* grad_logits, T* grad_rows,
                                   T* grad_coefficient, Isa isa) {
  const int64_t threads = choose_threads(p.num_threads, p.n * p.k, kElementsPerThread);
  const auto backward = kernels<T>(isa).backward;
  const Groups groups(p.row_index, p.n, p.u);
  const Backward<T> buffers{grad_loss, dlogits, scale, grad_logits, grad_rows, grad_coefficient};
  const int64_t tasks = std::min(threads, p.u);
  std::vector<double> gathered(static_cast<size_t>(tasks * p.k));
  // Ranges of pair-norm rows with equal work: their samples plus one for the row that is written.
  std::vector<int64_t> first(static_cast<size_t>(tasks) + 1, p.u);
  for (int64_t r = p.u - 1; r >= 0 && tasks > 0; --r) {
    const int64_t work_before = groups.begin[r] + r;
    for (int64_t task = 0; task < tasks; ++task) {
      if (work_before >= (p.n + p.u) * task / tasks) first[task] = r;
    }
  }
  parallel_for(tasks, threads, [&](int64_t task) {
    backward(p, buffers, groups.begin.data(), groups.sample.data(), first[task], first[task + 1],
             gathered.data() + task * p.k);
  });
}

#define LMTFAST_INSTANTIATE(T)                                                                  \
  template void margin_cross_entropy_forward(const MarginCrossEntropy<T>&, T*, T*, T*, Isa);    \
  template void margin_cross_entropy_backward(const MarginCrossEntropy<T>&, const T*, const T*, \
                                              const T*, T*, T*, T*, Isa);
LMTFAST_INSTANTIATE(float)
LMTFAST_INSTANTIATE(double)

}  // namespace cpu
}  // namespace lmtfast
