// SPDX-License-Identifier: MIT
// Included once per instruction set: image, adjoint and weight gradient.
#include "ops/cpu/plane_kernels.h"

template <class Weight>
const Weight* weight_of(const Convolution& op, int64_t row) {
  return static_cast<const Weight*>(op.weight) + row * columns(op.row);
}

// Aligned start of the packed operands of a task.
inline float* aligned(float* workspace) {
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  return workspace + (64 - address % 64) % 64 / sizeof(float);
}

// Row scale and identity of an image, where its rows are complete.
void finish_rows(const Convolution& op, const float* x, float* u, int64_t group, const Block& b) {
  for (int64_t r = b.first; r < b.last; ++r) {
    float* line = u + (group * op.row.rows + r) * op.outputs();
    if (op.row_scale) {
      scale_floats(line + b.begin, op.row_scale[group * op.row.rows + r], line + b.begin,
                   b.end - b.begin);
    }
    if (op.identity.empty() || r >= op.row.channels) continue;
    const float gain = static_cast<float>(op.row.identity);
    const float* channel = x + (group * op.row.channels + r) * op.inputs();
    for (int64_t o = b.begin; o < b.end; ++o) {
      const int64_t at = op.identity[static_cast<size_t>(o)];
      if (at >= 0) line[o] += gain * channel[at];
    }
  }
}

void finish_channel(const Convolution& op, const float* u, float* x, int64_t group, int64_t c) {
  if (op.identity.empty() || c >= op.row.rows) return;
  const float gain = static_cast<float>(op.row.identity);
  const float* line = u + (group * op.row.rows + c) * op.outputs();
  for (int64_t o = 0; o < op.outputs(); ++o) {
    const int64_t at = op.identity[static_cast<size_t>(o)];
    if (at >= 0) x[at] += gain * line[o];
  }
}

// One output position: rows of W times one vector, summed in double beyond kDepth vectors.
template <class Weight>
void image_of_one(const Convolution& op, const float* planes, float* u, int64_t group,
                  const Block& b, float* gathered) {
  const int64_t width = columns(op.row);
  Columns column(op, 0);
  for (int64_t k = 0; k < width; ++k, column.next()) gathered[k] = planes[column.offset()];
  for (int64_t r = b.first; r < b.last; ++r) {
    const Weight* w = weight_of<Weight>(op, group * op.row.rows + r);
    double total = 0.0;
    for (int64_t k0 = 0; k0 < width; k0 += kDepth * kWidth) {
      const int64_t end = std::min(width, k0 + kDepth * kWidth);
      Vec sums[4] = {v::zero(), v::zero(), v::zero(), v::zero()};
      int64_t k = k0;
      for (; k + 4 * kWidth <= end; k += 4 * kWidth) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          sums[j] =
              v::fma(v::load(w + k + j * kWidth), v::load(gathered + k + j * kWidth), sums[j]);
        }
      }
      for (; k < end; k += kWidth) {
        const int64_t n = std::min(end - k, kWidth);
        sums[0] = n == kWidth
                      ? v::fma(v::load(w + k), v::load(gathered + k), sums[0])
                      : v::fma(v::load_part(w + k, n), v::load_part(gathered + k, n), sums[0]);
      }
      float lanes[kWidth];
      v::store(lanes, (sums[0] + sums[1]) + (sums[2] + sums[3]));
      for (const float lane : lanes) total += lane;
    }
    u[group * op.row.rows + r] = static_cast<float>(total);
  }
}

template <class Weight>
void image_as(const Convolution& op, const float* planes, const float* x, float* u, const Block& b,
              float* workspace) {
  const int64_t depth_total = columns(op.row), points = op.outputs();
  float* staged = aligned(workspace);
  float* panels = staged + kTileRows * kStage;
  constexpr int64_t panel_stride = kDepth * kPanel;
  for (int64_t group = b.group; group < b.group_end; ++group) {
    const float* group_planes = planes + group * op.row.channels * op.stencil.plane;
    if (points == 1) {
      image_of_one<Weight>(op, group_planes, u, group, b, staged);
      finish_rows(op, x, u, group, b);
      continue;
    }
    Lanes lanes[kBlockColumns / kWidth];
    find_lanes(op, b.begin, b.end - b.begin, lanes);
    const int64_t count = b.last - b.first;
    for (int64_t k = 0; k < depth_total; k += kDepth) {
      const int64_t depth = std::min(depth_total - k, kDepth);
      for (int64_t o = b.begin; o < b.end; o += kPanel) {
        const int64_t n = std::min(b.end - o, kPanel), vectors = (n + kWidth - 1) / kWidth;
        gather_panel(op, group_planes, k, depth, lanes + (o - b.begin) / kWidth, vectors,
                     panels + (o - b.begin) / kPanel * panel_stride);
      }
      for (int64_t i = 0, low = 0; low < count; ++i) {
        const int64_t high = tile_begin(count, i + 1), r = group * op.row.rows + b.first + low;
        stage_rows(weight_of<Weight>(op, r) + k, depth_total, high - low, depth, staged);
        multiply_panels<true>(high - low, depth, staged, panels, panel_stride,
                              u + r * points + b.begin, points, b.end - b.begin, k > 0);
        low = high;
      }
    }
    finish_rows(op, x, u, group, b);
  }
}

// Stretches of a group's W row that hold the channels of a block: one, or one per tap.
struct Stretches {
  int64_t count, length, step, begin;
  Stretches(const Convolution& op, const Block& b)
      : count(op.tap_major ? taps(op.row) : 1),
        length((b.last - b.first) * (op.tap_major ? 1 : taps(op.row))),
        step(op.row.channels),
        begin(b.first * (op.tap_major ? 1 : taps(op.row))) {}
  int64_t offset(int64_t i) const { return begin + i * step; }
  int64_t rows() const { return count * length; }
};

// One output position: Z = W^T u, summed over kDepth rows at a time.
template <class Weight>
void adjoint_of_one(const Convolution& op, const float* u, int64_t group, const Stretches& parts,
                    float* z) {
  constexpr int64_t chunk = 32 * kWidth;
  float sums[chunk];
  for (int64_t part = 0; part < parts.count; ++part, z += parts.length) {
    for (int64_t k = 0; k < parts.length; k += chunk) {
      const int64_t n = std::min(chunk, parts.length - k);
      for (int64_t r0 = 0; r0 < op.row.rows; r0 += kDepth) {
        const int64_t end = std::min(op.row.rows, r0 + kDepth);
        std::memset(sums, 0, sizeof sums);
        for (int64_t r = group * op.row.rows + r0; r < group * op.row.rows + end; ++r) {
          const Weight* w = weight_of<Weight>(op, r) + parts.offset(part) + k;
          const Vec factor = v::broadcast(u[r]);
          int64_t j = 0;
          for (; j + kWidth <= n; j += kWidth) {
            v::store(sums + j, v::fma(factor, v::load(w + j), v::load(sums + j)));
          }
          if (j < n) {
            v::store(sums + j, v::fma(factor, v::load_part(w + j, n - j), v::load(sums + j)));
          }
        }
        if (r0 == 0) {
          copy_floats(sums, z + k, n);
        } else {
          add_floats(sums, z + k, n);
        }
      }
    }
  }
}

// Rows of Z = W^T U at outputs [begin, begin + count), into c with rows of stride `stride`.
template <class Weight>
void adjoint_product(const Convolution& op, const float* panels, int64_t group,
                     const Stretches& parts, int64_t begin, int64_t count, float* packed, float* c,
                     int64_t stride) {
  const int64_t rows = op.row.rows, width = columns(op.row);
  const int64_t per_group = (op.outputs() + kPanel - 1) / kPanel;
  const float* first = panels + (group * per_group + begin / kPanel) * rows * kPanel;
  for (int64_t r = 0; r < rows; r += kDepth) {
    const int64_t depth = std::min(rows - r, kDepth);
    const Weight* w = weight_of<Weight>(op, group * rows + r);
    for (int64_t part = 0; part < parts.count; ++part) {
      for (int64_t i = 0, low = 0; low < parts.length; ++i) {
        const int64_t high = tile_begin(parts.length, i + 1);
        pack_columns(w + parts.offset(part) + low, width, high - low, depth, packed);
        multiply_panels<false>(high - low, depth, packed, first + r * kPanel, rows * kPanel,
                               c + (part * parts.length + low) * stride, stride, count, r > 0);
        low = high;
      }
    }
  }
}

// Adds rows of Z at outputs [begin, begin + count) into the channels' planes.
inline void scatter(const Convolution& op, const float* z, int64_t stride, const Block& b,
                    int64_t begin, int64_t count, float* planes) {
  Run runs[kAdjointColumns];
  const int64_t found = find_runs(op.row, op.stencil, begin, count, kAdjointColumns, runs);
  const int64_t channels = b.last - b.first;
  for (int64_t i = 0; i < channels * taps(op.row); ++i, z += stride) {
    const int64_t c = op.tap_major ? i % channels : i / taps(op.row);
    const int64_t t = op.tap_major ? i / channels : i % taps(op.row);
    float* plane = planes + c * op.stencil.plane + op.stencil.tap_offset[static_cast<size_t>(t)];
    for (int64_t n = 0; n < found; ++n) {
      add_floats(z + runs[n].lane, plane + runs[n].place, runs[n].length);
    }
  }
}

template <class Weight>
void adjoint_as(const Convolution& op, const float* panels, const float* u, float* x,
                const Block& b, float* workspace) {
  const int64_t inputs = op.inputs(), points = op.outputs();
  const Stretches parts(op, b);
  float* packed = aligned(workspace);
  float* z = packed + kTileRows * kStage;
  const int64_t stride = adjoint_stride(op);
  float* planes = z + parts.rows() * stride;
  for (int64_t group = b.group; group < b.group_end; ++group) {
    float* out = x + (group * op.row.channels + b.first) * inputs;
    if (op.stencil.plain && points > 1) {
      for (int64_t o = 0; o < points; o += kAdjointColumns) {
        adjoint_product<Weight>(op, panels, group, parts, o, std::min(points - o, kAdjointColumns),
                                packed, out + o, inputs);
      }
    } else {
      std::memset(planes, 0,
                  static_cast<size_t>((b.last - b.first) * op.stencil.plane) * sizeof(float));
      for (int64_t o = 0; o < points; o += kAdjointColumns) {
        const int64_t count = std::min(points - o, kAdjointColumns);
        if (points == 1) {
          adjoint_of_one<Weight>(op, panels, group, parts, z);
        } else {
          adjoint_product<Weight>(op, panels, group, parts, o, count, packed, z, stride);
        }
        scatter(op, z, stride, b, o, count, planes);
      }
    }
    for (int64_t c = b.first; c < b.last; ++c, out += inputs) {
      const int64_t channel = group * op.row.channels + c;
      if (!(op.stencil.plain && points > 1)) {
        add_plane(op, planes + (c - b.first) * op.stencil.plane, out);
      }
      if (op.column_scale) scale_floats(out, op.column_scale[channel], out, inputs);
      finish_channel(op, u, out, group, c);
    }
  }
}

// dA of one row tile, rows of stride `stride`, into its gradient and sums.
template <class Weight>
void finish_gradient(const Convolution& op, const GradientTarget& target, const float* product,
                     int64_t stride, int64_t group, const Block& b, const float* scales) {
  const int64_t width = columns(op.row), n = b.end - b.begin;
  double* column_sums = target.column_sums + group * width + b.begin;
  std::fill(column_sums, column_sums + n, 0.0);
  for (int64_t r = b.first; r < b.last; ++r, product += stride) {
    const int64_t row = group * op.row.rows + r;
    const Weight* w = weight_of<Weight>(op, row) + b.begin;
    const float scale = op.row_scale ? op.row_scale[row] : 1.0f;
    float* out = target.gradient ? target.gradient + row * width + b.begin : nullptr;
    double sum = 0.0;
    for (int64_t k = 0; k < n; k += kWidth) {
      const int64_t here = std::min(n - k, kWidth);
      const Vec a = here == kWidth ? v::load(product + k) : v::load_part(product + k, here);
      const Vec both = (here == kWidth ? v::load(w + k) : v::load_part(w + k, here)) * a;
      const Vec s = here == kWidth ? v::load(scales + k) : v::load_part(scales + k, here);
      float lanes[2][kWidth];
      v::store(lanes[0], both);
      v::store(lanes[1], both * s);
      for (int64_t j = 0; j < here; ++j) {
        column_sums[k + j] += static_cast<double>(lanes[0][j]) * scale;
        sum += lanes[1][j];
      }
      if (out == nullptr) continue;
      const Vec value = a * s * v::broadcast(scale);
      if (here == kWidth) {
        v::store(out + k, target.accumulate ? v::load(out + k) + value : value);
      } else {
        v::store_part(out + k, target.accumulate ? v::load_part(out + k, here) + value : value,
                      here);
      }
    }
    target.row_sums[row] = sum;
  }
}

template <class Weight>
void gradient_as(const Convolution& op, const float* planes, const float* tiles,
                 const GradientTarget& target, const Block& b, float* workspace) {
  const int64_t width = columns(op.row), points = op.outputs(), n = b.end - b.begin;
  const int64_t per_group = (op.row.rows + kTileRows - 1) / kTileRows;
  const int64_t tile_size = points * kTileRows + kSlack;
  constexpr int64_t panel_stride = kDepth * kPanel;
  const bool sums = target.row_sums != nullptr;
  float* panels = aligned(workspace);
  float* scales = panels + kDepth * kBlockColumns + kSlack;
  float* product = scales + kBlockColumns;
  for (int64_t group = b.group; group < b.group_end; ++group) {
    const float* group_planes = planes + group * op.row.channels * op.stencil.plane;
    const int64_t row = group * op.row.rows;
    float* c = sums ? product : target.gradient + (row + b.first) * width + b.begin;
    const int64_t stride = sums ? kBlockColumns : width;
    for (int64_t o = 0; o < points; o += kDepth) {
      const int64_t depth = std::min(points - o, kDepth);
      Lanes lanes[kDepth / kWidth];
      find_lanes(op, o, depth, lanes);
      for (int64_t k = 0; k < n; k += kPanel) {
        gather_transposed(op, group_planes, b.begin + k, std::min(n - k, kPanel), lanes, depth,
                          panels + k / kPanel * panel_stride);
      }
      for (int64_t i = 0; i < per_group; ++i) {
        const int64_t low = tile_begin(op.row.rows, i), high = tile_begin(op.row.rows, i + 1);
        if (low < b.first || high > b.last) continue;
        multiply_panels<false>(high - low, depth,
                               tiles + (group * per_group + i) * tile_size + o * kTileRows, panels,
                               panel_stride, c + (low - b.first) * stride, stride, n,
                               o > 0 || (!sums && target.accumulate));
      }
    }
    if (!sums) continue;
    Columns column(op, b.begin);
    for (int64_t k = 0; k < n; ++k, column.next()) {
      const int64_t channel = group * op.row.channels + column.channel();
      scales[k] = op.column_scale ? op.column_scale[channel] : 1.0f;
    }
    finish_gradient<Weight>(op, target, product, kBlockColumns, group, b, scales);
  }
}

void image(const Convolution& op, const float* planes, const float* x, float* u, const Block& b,
           float* workspace) {
  (op.bfloat16 ? image_as<uint16_t> : image_as<float>)(op, planes, x, u, b, workspace);
}

void adjoint(const Convolution& op, const float* panels, const float* u, float* x, const Block& b,
             float* workspace) {
  (op.bfloat16 ? adjoint_as<uint16_t> : adjoint_as<float>)(op, panels, u, x, b, workspace);
}

void gradient(const Convolution& op, const float* planes, const float* tiles,
              const GradientTarget& target, const Block& b, float* workspace) {
  (op.bfloat16 ? gradient_as<uint16_t> : gradient_as<float>)(op, planes, tiles, target, b,
                                                             workspace);
}

constexpr ConvolutionKernels kKernels{kTileRows, kPanel,  fill_planes, fill_panels,    fill_tiles,
                                      image,     adjoint, gradient,    sum_of_squares, multiply};
