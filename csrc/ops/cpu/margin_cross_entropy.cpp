// SPDX-License-Identifier: MIT
// Margin cross-entropy on the CPU: instruction sets, threads and the order of accumulation.
// Layout: row-major rows of K, unit column stride. A forward task is a range of samples, a backward
// task a range of pair-norm rows with all their samples. Pair-norm gradients accumulate in double.
#include "ops/margin_cross_entropy.h"

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "core/parallel.h"
#include "ops/cpu/margin_cross_entropy_row.h"

namespace lmtfast {
namespace {

// Elements a thread must have to pay for waking it (about 10 us of work).
constexpr int64_t kElementsPerThread = 8192;

template <bool kFma, class T>
LMTFAST_INLINE void forward_rows(const MarginCrossEntropy<T>& p, Real<T>* loss, Real<T>* dlogits,
                                 Real<T>* scale, int64_t begin, int64_t end, Real<T>* widened) {
  for (int64_t i = begin; i < end; ++i) {
    const row::Row<Real<T>> sample = row::row_of(p, i, widened);
    if (p.member == LMTFAST_GLORO) {
      row::forward_row_gloro<kFma>(sample, loss + i, dlogits + i * p.k, scale + i);
    } else {
      row::forward_row<kFma>(p.member, sample, loss + i, dlogits + i * p.k, scale + i);
    }
  }
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
  const Real<T>*grad_loss, *dlogits, *scale;
  T* grad_logits;
  Real<T>*grad_rows, *grad_coefficient;
};

template <class T>
LMTFAST_INLINE void backward_groups(const MarginCrossEntropy<T>& p, const Backward<T>& buffers,
                                    const int64_t* begin, const int64_t* sample, int64_t first,
                                    int64_t last, double* gathered, Real<T>* widened) {
  for (int64_t r = first; r < last; ++r) {
    Real<T>* out = buffers.grad_rows + r * p.k;
    for (int64_t j = 0; j < p.k; ++j) gathered[j] = 0;
    for (int64_t s = begin[r]; s < begin[r + 1]; ++s) {
      const int64_t i = sample[s];
      buffers.grad_coefficient[i] = row::backward_row(
          p.member, row::row_of(p, i, widened), buffers.grad_loss[i], buffers.scale[i],
          buffers.dlogits + i * p.k, buffers.grad_logits + i * p.k, gathered);
    }
    for (int64_t j = 0; j < p.k; ++j) out[j] = static_cast<Real<T>>(gathered[j]);
  }
}

template <class T>
struct Kernels {
  void (*forward)(const MarginCrossEntropy<T>&, Real<T>*, Real<T>*, Real<T>*, int64_t, int64_t,
                  Real<T>*);
  void (*backward)(const MarginCrossEntropy<T>&, const Backward<T>&, const int64_t*, const int64_t*,
                   int64_t, int64_t, double*, Real<T>*);
};

// The bodies above are inlined into one pair of functions per instruction set; lambdas would lose
// the target attribute.
#define LMTFAST_KERNELS(name, attributes, fma)                                                    \
  template <class T>                                                                              \
  attributes void forward_##name(const MarginCrossEntropy<T>& p, Real<T>* loss, Real<T>* dlogits, \
                                 Real<T>* scale, int64_t begin, int64_t end, Real<T>* widened) {  \
    forward_rows<fma>(p, loss, dlogits, scale, begin, end, widened);                              \
  }                                                                                               \
  template <class T>                                                                              \
  attributes void backward_##name(const MarginCrossEntropy<T>& p, const Backward<T>& buffers,     \
                                  const int64_t* begin, const int64_t* sample, int64_t first,     \
                                  int64_t last, double* gathered, Real<T>* widened) {             \
    backward_groups(p, buffers, begin, sample, first, last, gathered, widened);                   \
  }                                                                                               \
  template <class T>                                                                              \
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
template void validate(const MarginCrossEntropy<uint16_t>&);

namespace cpu {

// Room for one row of logits per task, if they must be widened.
template <class T>
int64_t widened_size(const MarginCrossEntropy<T>& p) {
  return std::is_same_v<T, Real<T>> ? 0 : p.k;
}

template <class T>
void margin_cross_entropy_forward(const MarginCrossEntropy<T>& p, Real<T>* loss, Real<T>* dlogits,
                                  Real<T>* scale, Isa isa) {
  const int64_t threads = choose_threads(p.num_threads, p.n * p.k, kElementsPerThread);
  const auto forward = kernels<T>(isa).forward;
  const int64_t tasks = std::min(threads, p.n);
  const int64_t room = widened_size(p);
  std::vector<Real<T>> widened(static_cast<size_t>(tasks * room));
  parallel_for(tasks, threads, [&](int64_t task) {
    forward(p, loss, dlogits, scale, p.n * task / tasks, p.n * (task + 1) / tasks,
            widened.data() + task * room);
  });
}

template <class T>
void margin_cross_entropy_backward(const MarginCrossEntropy<T>& p, const Real<T>* grad_loss,
                                   const Real<T>* dlogits, const Real<T>* scale, T* grad_logits,
                                   Real<T>* grad_rows, Real<T>* grad_coefficient, Isa isa) {
  const int64_t threads = choose_threads(p.num_threads, p.n * p.k, kElementsPerThread);
  const auto backward = kernels<T>(isa).backward;
  const Groups groups(p.row_index, p.n, p.u);
  const Backward<T> buffers{grad_loss, dlogits, scale, grad_logits, grad_rows, grad_coefficient};
  const int64_t tasks = std::min(threads, p.u);
  const int64_t room = widened_size(p);
  std::vector<double> gathered(static_cast<size_t>(tasks * p.k));
  std::vector<Real<T>> widened(static_cast<size_t>(tasks * room));
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
             gathered.data() + task * p.k, widened.data() + task * room);
  });
}

#define LMTFAST_INSTANTIATE(T)                                                                 \
  template void margin_cross_entropy_forward(const MarginCrossEntropy<T>&, Real<T>*, Real<T>*, \
                                             Real<T>*, Isa);                                   \
  template void margin_cross_entropy_backward(const MarginCrossEntropy<T>&, const Real<T>*,    \
                                              const Real<T>*, const Real<T>*, T*, Real<T>*,    \
                                              Real<T>*, Isa);
LMTFAST_INSTANTIATE(float)
LMTFAST_INSTANTIATE(double)
LMTFAST_INSTANTIATE(uint16_t)

}  // namespace cpu
}  // namespace lmtfast
