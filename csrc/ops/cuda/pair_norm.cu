// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>

#include "core/device.h"
#include "ops/cuda/pair_norm.h"
#include "ops/cuda/team.h"

namespace lmtfast::cuda {
namespace {

// A block of 16 x 16 threads has a tile of 64 x 64 results, 4 x 4 per thread, and walks the
// contracted axis in steps of 16.
constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;
constexpr int kPer = 4;
constexpr int kTile = kSide * kPer;
constexpr int kStep = 16;
// A row of a tile in shared memory: 4 elements of padding spread the writes of a step over the
// banks.
constexpr int kPitch = kTile + 4;

// Row of the head that row `u` of the table belongs to, or -1.
template <class T>
__device__ int64_t class_of(const PairNorm<T>& p, int64_t u) {
  if (u >= p.u) return -1;
  if (p.classes == nullptr) return u;
  const int64_t c = p.classes[u];
  return c >= 0 && c < p.k ? c : -1;
}

template <class T>
__device__ Compute<T> weight_at(const PairNorm<T>& p, int64_t row, int64_t column) {
  return widen(p.weight[row * p.weight_stride + column]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(PairNorm<T> p, Compute<T>* norms) {
  using C = Compute<T>;
  LMTFAST_SHARED(C, first, [kStep][kPitch]);
  LMTFAST_SHARED(C, second, [kStep][kPitch]);
  const int64_t u0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t j0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int thread = static_cast<int>(threadIdx.x);
  const int tx = thread % kSide, ty = thread / kSide;
  C sum[kPer][kPer] = {};
  for (int64_t d0 = 0; d0 < p.d; d0 += kStep) {
    // Sixteen neighbouring threads read one row's step.
    for (int i = thread; i < kTile * kStep; i += kThreads) {
      const int row = i / kStep, step = i % kStep;
      const int64_t d = d0 + step, j = j0 + row, c = class_of(p, u0 + row);
      first[step][row] = d < p.d && c >= 0 ? weight_at(p, c, d) : C(0);
      second[step][row] = d < p.d && j < p.k ? weight_at(p, j, d) : C(0);
    }
    __syncthreads();
    // A sum of its own for each step keeps the error at that of a tree.
    C part[kPer][kPer] = {};
    for (int step = 0; step < kStep; ++step) {
      for (int a = 0; a < kPer; ++a) {
        for (int b = 0; b < kPer; ++b) {
          const C difference = first[step][ty + a * kSide] - second[step][tx + b * kSide];
          part[a][b] = std::fma(difference, difference, part[a][b]);
        }
      }
    }
    for (int a = 0; a < kPer; ++a) {
      for (int b = 0; b < kPer; ++b) sum[a][b] += part[a][b];
    }
    __syncthreads();
  }
  for (int a = 0; a < kPer; ++a) {
    const int64_t u = u0 + ty + a * kSide;
    if (u >= p.u) continue;
    const int64_t c = class_of(p, u);
    for (int b = 0; b < kPer; ++b) {
      const int64_t j = j0 + tx + b * kSide;
      if (j >= p.k) continue;
      const C norm = c < 0 ? std::numeric_limits<C>::quiet_NaN() : std::sqrt(sum[a][b]);
      norms[u * p.k + j] = j == c ? C(0) : norm;
    }
  }
}

// Adds own[u] to the row of its class, for u ascending, in a tile that holds the rows row0 + ty +
// 16 a and the columns column0 + tx + 16 b.
template <class T>
__device__ void gather_own(const PairNorm<T>& p, const Compute<T>* own, int64_t row0,
                           int64_t column0, int tx, int ty, Compute<T> (&sum)[kPer][kPer]) {
  LMTFAST_SHARED(int, found, [kThreads]);
  LMTFAST_SHARED(int, found_row, [kThreads]);
  LMTFAST_SHARED(int, warp_count, [kThreads / kWarpSize]);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  for (int64_t base = 0; base < p.u; base += kThreads) {
    const int64_t row = class_of(p, base + thread) - row0;
    const bool mine = base + thread < p.u && row >= 0 && row < kTile;
    const unsigned ballot = __ballot_sync(kAllLanes, mine);
    // Whoever still reads the list before.
    __syncthreads();
    if (lane == 0) warp_count[warp] = __popc(ballot);
    __syncthreads();
    int position = __popc(ballot & ((1u << lane) - 1u)), total = 0;
    for (int w = 0; w < kThreads / kWarpSize; ++w) {
      position += w < warp ? warp_count[w] : 0;
      total += warp_count[w];
    }
    if (mine) {
      found[position] = thread;
      found_row[position] = static_cast<int>(row);
    }
    __syncthreads();
    for (int i = 0; i < total; ++i) {
      const Compute<T>* source = own + (base + found[i]) * p.d;
      for (int a = 0; a < kPer; ++a) {
        if (found_row[i] != ty + a * kSide) continue;
        for (int b = 0; b < kPer; ++b) {
          const int64_t d = column0 + tx + b * kSide;
          if (d < p.d) sum[a][b] += source[d];
        }
      }
    }
  }
}

// With r[u, j] = grad / norms:
//   kGather false: out[u, d] = sum over j of r[u, j] (w[class of u, d] - w[j, d])
//   kGather true:  out[j, d] = sum over u of r[u, j] (w[j, d] - w[class of u, d]), plus own[u, d]
//                  for every u whose class is j
template <class T, bool kGather, class Out>
__global__ void __launch_bounds__(kThreads)
    vjp_kernel(PairNorm<T> p, const Compute<T>* norms, const Compute<T>* grad,
               const Compute<T>* own, Out* out) {
  using C = Compute<T>;
  LMTFAST_SHARED(C, ratio, [kStep][kPitch]);
  LMTFAST_SHARED(C, other, [kStep][kPitch]);
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int thread = static_cast<int>(threadIdx.x);
  const int tx = thread % kSide, ty = thread / kSide;
  const int64_t rows = kGather ? p.k : p.u;
  const int64_t others = kGather ? p.u : p.k;
  C mine[kPer][kPer], sum[kPer][kPer] = {};
  for (int a = 0; a < kPer; ++a) {
    const int64_t row = row0 + ty + a * kSide;
    const int64_t c = row >= rows ? -1 : kGather ? row : class_of(p, row);
    for (int b = 0; b < kPer; ++b) {
      const int64_t d = column0 + tx + b * kSide;
      mine[a][b] = c >= 0 && d < p.d ? weight_at(p, c, d) : C(0);
    }
  }
  for (int64_t q0 = 0; q0 < others; q0 += kStep) {
    for (int i = thread; i < kTile * kStep; i += kThreads) {
      // Neighbouring threads read neighbouring entries of grad and norms: those of j.
      const int row = kGather ? i % kTile : i / kStep, step = kGather ? i / kTile : i % kStep;
      const int64_t u = kGather ? q0 + step : row0 + row;
      const int64_t j = kGather ? row0 + row : q0 + step;
      const bool inside = u < p.u && j < p.k && class_of(p, u) >= 0;
      const C norm = inside ? norms[u * p.k + j] : C(0);
      ratio[step][row] = norm == C(0) ? C(0) : grad[u * p.k + j] / norm;
    }
    for (int i = thread; i < kTile * kStep; i += kThreads) {
      const int column = i % kTile, step = i / kTile;
      const int64_t q = q0 + step, d = column0 + column;
      const int64_t c = q >= others ? -1 : kGather ? class_of(p, q) : q;
      other[step][column] = c >= 0 && d < p.d ? weight_at(p, c, d) : C(0);
    }
    __syncthreads();
    C part[kPer][kPer] = {};
    for (int step = 0; step < kStep; ++step) {
      for (int a = 0; a < kPer; ++a) {
        for (int b = 0; b < kPer; ++b) {
          const C difference = mine[a][b] - other[step][tx + b * kSide];
          part[a][b] = std::fma(ratio[step][ty + a * kSide], difference, part[a][b]);
        }
      }
    }
    for (int a = 0; a < kPer; ++a) {
      for (int b = 0; b < kPer; ++b) sum[a][b] += part[a][b];
    }
    __syncthreads();
  }
  if constexpr (kGather) gather_own(p, own, row0, column0, tx, ty, sum);
  for (int a = 0; a < kPer; ++a) {
    const int64_t row = row0 + ty + a * kSide;
    for (int b = 0; b < kPer; ++b) {
      const int64_t d = column0 + tx + b * kSide;
      if (row < rows && d < p.d) narrow(sum[a][b], out[row * p.d + d]);
    }
  }
}

unsigned tiles(int64_t length) { return static_cast<unsigned>((length + kTile - 1) / kTile); }

}  // namespace

template <class T>
void pair_norm_forward(const PairNorm<T>& p, Compute<T>* norms, Stream stream) {
  LMTFAST_LAUNCH(forward_kernel<T>, dim3(tiles(p.k), tiles(p.u)), kThreads, 0, stream, p, norms);
}

template <class T>
void pair_norm_vjp(const PairNorm<T>& p, const Compute<T>* norms, const Compute<T>* grad,
                   Compute<T>* own, T* grad_weight, Stream stream) {
  using C = Compute<T>;
  LMTFAST_LAUNCH((vjp_kernel<T, false, C>), dim3(tiles(p.d), tiles(p.u)), kThreads, 0, stream, p,
                 norms, grad, nullptr, own);
  LMTFAST_LAUNCH((vjp_kernel<T, true, T>), dim3(tiles(p.d), tiles(p.k)), kThreads, 0, stream, p,
                 norms, grad, own, grad_weight);
}

#define LMTFAST_INSTANTIATE(T)                                                          \
  template void pair_norm_forward(const PairNorm<T>&, Compute<T>*, Stream);             \
  template void pair_norm_vjp(const PairNorm<T>&, const Compute<T>*, const Compute<T>*, \
                              Compute<T>*, T*, Stream);
LMTFAST_INSTANTIATE(float)
LMTFAST_INSTANTIATE(double)
LMTFAST_INSTANTIATE(bfloat16)

}  // namespace lmtfast::cuda
