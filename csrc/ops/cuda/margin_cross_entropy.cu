// SPDX-License-Identifier: MIT
#include <algorithm>

#include "core/device.h"
#include "ops/cuda/margin_cross_entropy.h"
#include "ops/cuda/margin_row.h"
#include "ops/cuda/team.h"

namespace lmtfast::cuda {
namespace {

constexpr unsigned kThreads = 256;
// Up to here a warp takes a row: its classes are 16 loads per thread or fewer.
constexpr int64_t kWarpClasses = 512;
constexpr int64_t kBlockClasses = 8192;
// What every device from compute capability 8.0 on grants a block.
constexpr size_t kSharedBytes = 96 << 10;
constexpr unsigned kGatherWarps = 4;
constexpr int kGatherColumns = 4;
constexpr int kGatherTile = kWarpSize * kGatherColumns;

template <class T>
__device__ bool in_range(const MarginProblem<T>& p, int64_t i) {
  const int64_t t = p.target[i], r = p.row_index[i];
  return t >= 0 && t < p.k && r >= 0 && r < p.u;
}

template <class T, bool kKept>
__device__ RowSource<T, kKept> source_of(const MarginProblem<T>& p, int64_t i, Compute<T>* kept) {
  return {p.logits + i * p.logits_stride, p.rows + p.row_index[i] * p.rows_stride, p.coefficient[i],
          kept, kKept ? kept + p.k : nullptr};
}

// kKept: logits and additions of a row stay in shared memory, 2 k values per team, so that the
// passes over a row read global memory once.
template <class T, bool kBlock, bool kKept>
__global__ void __launch_bounds__(4 * kThreads, 1)
    forward_kernel(MarginProblem<T> p, Compute<T>* loss, Compute<T>* dlogits, Compute<T>* scale) {
  using C = Compute<T>;
  using Crew = Team<kBlock>;
  LMTFAST_DYNAMIC_SHARED(C, shared);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * Crew::per_block() + Crew::number();
  if (i >= p.n) return;
  const uint32_t k = static_cast<uint32_t>(p.k);
  const uint32_t first = static_cast<uint32_t>(Crew::rank());
  const uint32_t step = static_cast<uint32_t>(Crew::size());
  const RowResult<C> out{loss + i, dlogits + i * p.k, scale + i};
  if (!in_range(p, i)) {
    for (uint32_t j = first; j < k; j += step) out.dz[j] = not_a_number<C>();
    if (first == 0) *out.loss = *out.scale = not_a_number<C>();
    return;
  }
  const auto row = source_of<T, kKept>(p, i, shared + Crew::number() * 2 * p.k);
  if constexpr (kKept) {
    for (uint32_t j = first; j < k; j += step) row.keep(j);
  }
  const uint32_t t = static_cast<uint32_t>(p.target[i]);
  if (p.member == LMTFAST_GLORO) {
    forward_gloro<Crew>(row, k, t, out);
  } else {
    forward_shift<Crew>(p.member, row, k, t, out);
  }
}

template <class T>
struct Gradients {
  using C = Compute<T>;
  const C *grad_loss, *dlogits, *scale;
  T* grad_logits;
  C *grad_rows, *grad_coefficient;
  int32_t* order;   // (n), samples by row of the table, ascending within one
  int32_t* begin;   // (u + 1), where each row's samples begin in it
  int32_t* bottom;  // (n), the class that attains GloRo's extra logit, -1 where none does
};

// grad_logits and grad_coefficient of one sample.
template <class T, class Crew>
__device__ void backward_row(const MarginProblem<T>& p, const Gradients<T>& out, int64_t i) {
  using C = Compute<T>;
  const uint32_t k = static_cast<uint32_t>(p.k);
  const uint32_t first = static_cast<uint32_t>(Crew::rank());
  const uint32_t step = static_cast<uint32_t>(Crew::size());
  const C g = out.grad_loss[i];
  const C* dz = out.dlogits + i * p.k;
  T* gz = out.grad_logits + i * p.k;
  for (uint32_t j = first; j < k; j += step) narrow(g * dz[j], gz[j]);
  if (!in_range(p, i)) {
    if (first == 0) {
      out.grad_coefficient[i] = not_a_number<C>();
      out.bottom[i] = -1;
    }
    return;
  }
  const auto row = source_of<T, false>(p, i, nullptr);
  const C scale = out.scale[i];
  double total = 0;
  if (p.member == LMTFAST_GLORO) {
    const Bottom<C> bottom = bottom_of<Crew>(row, k);
    if (bottom.index >= 0) {
      total = static_cast<double>(scale) * static_cast<double>(row.b[bottom.index]);
    }
    if (first == 0) out.bottom[i] = bottom.index;
  } else {
    const uint32_t t = static_cast<uint32_t>(p.target[i]);
    const C zt = widen(row.z[t]);
    for (uint32_t j = first; j < k; j += step) {
      if (j == t) continue;
      const C s = p.member == LMTFAST_EMMA ? class_ratio(zt - row.logit(j), row.addition(j)) : C(1);
      total += static_cast<double>(s * dz[j]) * static_cast<double>(row.b[j]);
    }
    total = Crew::sum(total);
    // EMMA's saved scale is 1.
    total *= static_cast<double>(scale);
  }
  if (first == 0) out.grad_coefficient[i] = static_cast<C>(static_cast<double>(g) * total);
}

// One warp lists the samples of row `u`: every lane looks at each 32nd sample, twice.
template <class T>
__device__ void list_samples(const MarginProblem<T>& p, const Gradients<T>& out, int64_t u) {
  const int lane = Team<false>::rank();
  int less = 0, equal = 0;
  for (int64_t i = lane; i < p.n; i += kWarpSize) {
    const int64_t r = p.row_index[i];
    less += r >= 0 && r < u;
    equal += r == u;
  }
  less = Team<false>::sum(less);
  equal = Team<false>::sum(equal);
  if (lane == 0) {
    out.begin[u] = less;
    if (u == p.u - 1) out.begin[p.u] = less + equal;
  }
  int position = less;
  for (int64_t base = 0; base < p.n; base += kWarpSize) {
    const int64_t i = base + lane;
    const bool mine = i < p.n && p.row_index[i] == u;
    const unsigned found = __ballot_sync(kAllLanes, mine);
    const unsigned before = found & ((1u << lane) - 1u);
    if (mine) out.order[position + __popc(before)] = static_cast<int32_t>(i);
    position += __popc(found);
  }
}

// The first `row_blocks` blocks take samples, the others rows of the table.
template <class T, bool kBlock>
__global__ void __launch_bounds__(4 * kThreads, 1)
    backward_kernel(MarginProblem<T> p, Gradients<T> out, unsigned row_blocks) {
  if (blockIdx.x < row_blocks) {
    using Crew = Team<kBlock>;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * Crew::per_block() + Crew::number();
    if (i < p.n) backward_row<T, Crew>(p, out, i);
  } else {
    using Crew = Team<false>;
    const int64_t u =
        static_cast<int64_t>(blockIdx.x - row_blocks) * Crew::per_block() + Crew::number();
    if (u < p.u) list_samples(p, out, u);
  }
}

// grad_rows[u], a tile of columns: the warps share the row's samples, and the parts are added in
// the order of the warps.
template <class T>
__global__ void gather_kernel(MarginProblem<T> p, Gradients<T> out) {
  using C = Compute<T>;
  LMTFAST_SHARED(double, part, [kGatherWarps][kGatherTile]);
  const int lane = Team<false>::rank(), warp = Team<false>::number();
  const int64_t u = blockIdx.x;
  const int64_t tile = static_cast<int64_t>(blockIdx.y) * kGatherTile;
  double sum[kGatherColumns] = {};
  for (int s = out.begin[u] + warp; s < out.begin[u + 1]; s += kGatherWarps) {
    const int64_t i = out.order[s];
    const int64_t t = p.target[i];
    const C* dz = out.dlogits + i * p.k;
    const T* z = p.logits + i * p.logits_stride;
    const C* b = p.rows + u * p.rows_stride;
    const C c = p.coefficient[i];
    const double factor = static_cast<double>(out.grad_loss[i]) * static_cast<double>(c) *
                          static_cast<double>(out.scale[i]);
    const C zt = t >= 0 && t < p.k ? widen(z[t]) : not_a_number<C>();
    for (int column = 0; column < kGatherColumns; ++column) {
      const int64_t j = tile + column * kWarpSize + lane;
      if (j >= p.k) continue;
      if (p.member == LMTFAST_GLORO) {
        if (j == out.bottom[i]) sum[column] += factor;
      } else if (j != t) {
        const C s = p.member == LMTFAST_EMMA ? class_ratio(zt - widen(z[j]), c * b[j]) : C(1);
        sum[column] += factor * static_cast<double>(s * dz[j]);
      }
    }
  }
  for (int column = 0; column < kGatherColumns; ++column) {
    part[warp][column * kWarpSize + lane] = sum[column];
  }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (tile + column < p.k) {
    double total = part[0][column];
    for (unsigned w = 1; w < kGatherWarps; ++w) total += part[w][column];
    out.grad_rows[u * p.k + tile + column] = static_cast<C>(total);
  }
}
static_assert(kGatherTile == kGatherWarps * kWarpSize, "one thread per column of the tile");

template <class T>
struct Shape {
  bool block;
  bool kept;
  unsigned threads;
  unsigned rows_per_block;
  size_t shared_bytes;

  explicit Shape(int64_t k) {
    const auto row_bytes = static_cast<size_t>(2 * k) * sizeof(Compute<T>);
    block = k > kWarpClasses;
    kept = row_bytes <= kSharedBytes;
    threads = k > kBlockClasses ? 4 * kThreads : kThreads;
    rows_per_block = block ? 1 : kThreads / kWarpSize;
    shared_bytes = kept ? rows_per_block * row_bytes : 0;
  }
};

unsigned blocks(int64_t items, unsigned per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace

template <class T>
void margin_forward(const MarginProblem<T>& p, Compute<T>* loss, Compute<T>* dlogits,
                    Compute<T>* scale, Stream stream) {
  const Shape<T> shape(p.k);
  const auto kernel = !shape.block ? forward_kernel<T, false, true>
                      : shape.kept ? forward_kernel<T, true, true>
                                   : forward_kernel<T, true, false>;
  LMTFAST_LAUNCH(kernel, blocks(p.n, shape.rows_per_block), shape.threads, shape.shared_bytes,
                 stream, p, loss, dlogits, scale);
}

template <class T>
void margin_backward(const MarginProblem<T>& p, const Compute<T>* grad_loss,
                     const Compute<T>* dlogits, const Compute<T>* scale, T* grad_logits,
                     Compute<T>* grad_rows, Compute<T>* grad_coefficient, int32_t* workspace,
                     Stream stream) {
  const Shape<T> shape(p.k);
  const Gradients<T> out{grad_loss,   dlogits,         scale,
                         grad_logits, grad_rows,       grad_coefficient,
                         workspace,   workspace + p.n, workspace + p.n + p.u + 1};
  const unsigned row_blocks = blocks(p.n, shape.rows_per_block);
  const unsigned list_blocks = blocks(p.u, shape.threads / kWarpSize);
  const auto kernel = shape.block ? backward_kernel<T, true> : backward_kernel<T, false>;
  LMTFAST_LAUNCH(kernel, row_blocks + list_blocks, shape.threads, 0, stream, p, out, row_blocks);
  const dim3 tiles(static_cast<unsigned>(p.u), blocks(p.k, kGatherTile));
  LMTFAST_LAUNCH(gather_kernel<T>, tiles, kGatherWarps * kWarpSize, 0, stream, p, out);
}

#define LMTFAST_INSTANTIATE(T)                                                                 \
  template void margin_forward(const MarginProblem<T>&, Compute<T>*, Compute<T>*, Compute<T>*, \
                               Stream);                                                        \
  template void margin_backward(const MarginProblem<T>&, const Compute<T>*, const Compute<T>*, \
                                const Compute<T>*, T*, Compute<T>*, Compute<T>*, int32_t*,     \
                                Stream);
LMTFAST_INSTANTIATE(float)
LMTFAST_INSTANTIATE(double)
LMTFAST_INSTANTIATE(bfloat16)

}  // namespace lmtfast::cuda
