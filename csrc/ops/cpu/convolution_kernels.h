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

// Row scale, identity and squares of an image, where its rows are complete.
inline void finish_rows(const Convolution& op, const float* x, float* u, double* squares,
                        int64_t group, const Block& b) {
  const int64_t per_row = image_squares(op) / (op.row.groups * op.row.rows), n = b.end - b.begin;
  for (int64_t r = b.first; r < b.last; ++r) {
    const int64_t row = group * op.row.rows + r;
    float* line = u + row * op.outputs();
    if (op.row_scale) scale_floats(line + b.begin, op.row_scale[row], line + b.begin, n);
    if (!op.identity.empty() && r < op.row.channels) {
      const float gain = static_cast<float>(op.row.identity);
      const float* channel = x + (group * op.row.channels + r) * op.inputs();
      for (int64_t o = b.begin; o < b.end; ++o) {
        const int64_t at = op.identity[static_cast<size_t>(o)];
        if (at >= 0) line[o] += gain * channel[at];
      }
    }
    squares[row * per_row + b.begin / kImageColumns] = sum_of_squares(line + b.begin, n);
  }
}

// The same for a channel of an adjoint.
inline void finish_channel(const Convolution& op, const float* u, float* x, double* squares,
                           int64_t group, int64_t c, const Block& b) {
  const int64_t channel = group * op.row.channels + c, n = b.end - b.begin;
  const int64_t per_channel = adjoint_squares(op) / (op.row.groups * op.row.channels);
  if (op.column_scale) scale_floats(x + b.begin, op.column_scale[channel], x + b.begin, n);
  if (!op.identity.empty() && c < op.row.rows) {
    const float gain = static_cast<float>(op.row.identity);
    const float* line = u + (group * op.row.rows + c) * op.outputs();
    // A block of some of the inputs has a plain stencil, whose outputs are the inputs.
    const bool plain = adjoint_by_columns(op);
    for (int64_t o = plain ? b.begin : 0; o < (plain ? b.end : op.outputs()); ++o) {
      const int64_t at = op.identity[static_cast<size_t>(o)];
      if (at >= 0) x[at] += gain * line[o];
    }
  }
  squares[channel * per_channel + b.begin / kAdjointColumns] = sum_of_squares(x + b.begin, n);
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
void image_as(const Convolution& op, const float* planes, const float* x, float* u, double* squares,
              const Block& b, float* workspace) {
  const int64_t depth_total = columns(op.row), points = op.outputs();
  float* staged = aligned(workspace);
  float* panels = staged + kTileRows * kStage;
  constexpr int64_t panel_stride = kDepth * kPanel;
  for (int64_t group = b.group; group < b.group_end; ++group) {
    const float* group_planes = planes + group * op.row.channels * op.stencil.plane;
    if (points == 1) {
      image_of_one<Weight>(op, group_planes, u, group, b, staged);
      finish_rows(op, x, u, squares, group, b);
      continue;
    }
    Lanes lanes[kImageColumns / kWidth];
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
        const Weight* w = weight_of<Weight>(op, r) + k;
        stage_rows(w, depth_total, high - low, depth, staged);
        // The next tile's rows; behind the last, the next depth range of the first.
        const Weight* next =
            high < count ? w + (high - low) * depth_total : w - low * depth_total + kDepth;
        const Ahead ahead(next, 64, depth_total * static_cast<int64_t>(sizeof(Weight)));
        multiply_panels<true>(high - low, depth, staged, panels, panel_stride,
                              u + r * points + b.begin, points, b.end - b.begin, k > 0, &ahead, 1);
        low = high;
      }
    }
    finish_rows(op, x, u, squares, group, b);
  }
}

// Stretches of a group's W row that hold channels [first, last): one, or one per tap.
struct Stretches {
  int64_t count, length, step, begin;
  Stretches(const Convolution& op, int64_t first, int64_t last)
      : count(op.tap_major ? taps(op.row) : 1),
        length((last - first) * (op.tap_major ? 1 : taps(op.row))),
        step(op.row.channels),
        begin(first * (op.tap_major ? 1 : taps(op.row))) {}
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
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(Weight));
  for (int64_t part = 0; part < parts.count; ++part) {
    for (int64_t r = 0; r < rows; r += kDepth) {
      const int64_t depth = std::min(rows - r, kDepth);
      const Weight* w = weight_of<Weight>(op, group * rows + r) + parts.offset(part);
      pack_columns(w, width, parts.length, depth, packed);
      // What is packed next: these columns further down, or the columns beside them from the top.
      const Weight* next = r + kDepth < rows ? w + kDepth * width : w - r * width + parts.length;
      for (int64_t i = 0, low = 0; low < parts.length; ++i) {
        const int64_t high = tile_begin(parts.length, i + 1);
        const Ahead ahead(next + i * 64 / static_cast<int64_t>(sizeof(Weight)), row_bytes,
                          row_bytes * kAhead);
        multiply_panels<false>(high - low, depth, packed + i * kPackedTile, first + r * kPanel,
                               rows * kPanel, c + (part * parts.length + low) * stride, stride,
                               count, r > 0, &ahead, 1);
        low = high;
      }
    }
  }
}

// Adds rows of Z at outputs [begin, begin + count) into the channels' planes.
inline void scatter(const Convolution& op, const float* z, int64_t stride, int64_t channels,
                    int64_t begin, int64_t count, float* planes) {
  Run runs[kAdjointColumns];
  const int64_t found = find_runs(op.row, op.stencil, begin, count, kAdjointColumns, runs);
  for (int64_t i = 0; i < channels * taps(op.row); ++i, z += stride) {
    const int64_t c = op.tap_major ? i % channels : i / taps(op.row);
    const int64_t t = op.tap_major ? i / channels : i % taps(op.row);
    float* plane = planes + c * op.stencil.plane + op.stencil.tap_offset[static_cast<size_t>(t)];
    for (int64_t n = 0; n < found; ++n) {
      add_floats(z + runs[n].lane, plane + runs[n].place, runs[n].length);
    }
  }
}

// Channels [first, last) of one group's adjoint, few enough for the workspace, at the block's inputs.
template <class Weight>
void adjoint_channels(const Convolution& op, const float* panels, int64_t group, int64_t first,
                      int64_t last, float* x, const Block& b, float* workspace) {
  const int64_t inputs = op.inputs(), points = op.outputs(), stride = adjoint_stride(op);
  const Stretches parts(op, first, last);
  float* packed = aligned(workspace);
  if (adjoint_by_columns(op)) {
    adjoint_product<Weight>(op, panels, group, parts, b.begin, b.end - b.begin, packed, x + b.begin,
                            inputs);
    return;
  }
  const int64_t tiles = points == 1 ? 0 : (parts.length + kTileRows - 1) / kTileRows;
  float* z = packed + tiles * kPackedTile;
  float* planes = z + parts.rows() * stride;
  std::memset(planes, 0, static_cast<size_t>((last - first) * op.stencil.plane) * sizeof(float));
  for (int64_t o = 0; o < points; o += kAdjointColumns) {
    const int64_t count = std::min(points - o, kAdjointColumns);
    if (points == 1) {
      adjoint_of_one<Weight>(op, panels, group, parts, z);
    } else {
      adjoint_product<Weight>(op, panels, group, parts, o, count, packed, z, stride);
    }
    scatter(op, z, stride, last - first, o, count, planes);
  }
  for (int64_t c = 0; c < last - first; ++c) {
    add_plane(op, planes + c * op.stencil.plane, x + c * inputs);
  }
}

template <class Weight>
void adjoint_as(const Convolution& op, const float* panels, const float* u, float* x,
                double* squares, const Block& b, float* workspace) {
  const int64_t inputs = op.inputs(), wanted = b.last - b.first;
  const int64_t parts = (wanted + adjoint_width(op) - 1) / adjoint_width(op);
  for (int64_t group = b.group; group < b.group_end; ++group) {
    float* channels = x + group * op.row.channels * inputs;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = b.first + wanted * i / parts;
      const int64_t last = b.first + wanted * (i + 1) / parts;
      adjoint_channels<Weight>(op, panels, group, first, last, channels + first * inputs, b,
                               workspace);
      for (int64_t c = first; c < last; ++c) {
        finish_channel(op, u, channels + c * inputs, squares, group, c, b);
      }
    }
  }
}

// dA of rows [first, last) and the block's columns, at `product` with rows of stride `stride`, into
// the gradient and the sums. `scales` is of the columns; null for ones, and then without their sums.
template <class Weight>
void finish_gradient(const Convolution& op, const GradientTarget& target, const float* product,
                     int64_t stride, int64_t group, int64_t first, int64_t last, const Block& b,
                     const float* scales) {
  const int64_t width = columns(op.row), n = b.end - b.begin;
  double* column_sums = target.column_sums + group * width + b.begin;
  for (int64_t r = first; r < last; ++r, product += stride) {
    const int64_t row = group * op.row.rows + r;
    const Weight* w = weight_of<Weight>(op, row) + b.begin;
    const float scale = op.row_scale ? op.row_scale[row] : 1.0f;
    const Vec factor = v::broadcast(scale);
    float* out = target.gradient ? target.gradient + row * width + b.begin : nullptr;
    float times_w[kGradientColumns], lanes[kWidth];
    Vec sum = v::zero();
    for (int64_t k = 0; k < n; k += kWidth) {
      const int64_t here = std::min(n - k, kWidth);
      const bool whole = here == kWidth;
      // Beyond the last column there may be anything, NaN included.
      Vec a = whole ? v::load(product + k) : v::load_part(product + k, here);
      const Vec b_w = a * (whole ? v::load(w + k) : v::load_part(w + k, here));
      if (scales) {
        const Vec s = whole ? v::load(scales + k) : v::load_part(scales + k, here);
        v::store(times_w + k, b_w);
        sum = v::fma(b_w, s, sum);
        a = a * s;
      } else {
        sum = sum + b_w;
      }
      if (out == nullptr) continue;
      a = a * factor;
      if (whole) {
        v::store(out + k, target.accumulate ? v::load(out + k) + a : a);
      } else {
        v::store_part(out + k, target.accumulate ? v::load_part(out + k, here) + a : a, here);
      }
    }
    for (int64_t k = 0; scales && k < n; ++k) {
      column_sums[k] += static_cast<double>(times_w[k]) * scale;
    }
    v::store(lanes, sum);
    double total = 0.0;
    for (const float lane : lanes) total += lane;
    target.row_sums[row] = total;
  }
}

// A panel's weights and its place in the gradient, a line of each of kAhead rows at a time.
template <class Weight>
Ahead gradient_ahead(const Weight* w, const float* gradient, int64_t width) {
  Ahead ahead(w, width * static_cast<int64_t>(sizeof(Weight)), 0);
  for (int64_t i = 0; i < kDepth / kAhead; ++i) {
    const bool second = gradient && i % 2 == 1;
    const char* start =
        second ? reinterpret_cast<const char*>(gradient) : reinterpret_cast<const char*>(w);
    ahead.group[i] = start + i / (gradient ? 2 : 1) * 64;
  }
  return ahead;
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
  float* scales = panels + kDepth * kGradientColumns + kSlack;
  float* product = scales + kGradientColumns;
  for (int64_t group = b.group; group < b.group_end; ++group) {
    const float* group_planes = planes + group * op.row.channels * op.stencil.plane;
    const int64_t row = group * op.row.rows;
    float* c = sums ? product : target.gradient + (row + b.first) * width + b.begin;
    const int64_t stride = sums ? kGradientColumns : width;
    if (sums) {
      Columns column(op, b.begin);
      for (int64_t k = 0; op.column_scale && k < n; ++k, column.next()) {
        scales[k] = op.column_scale[group * op.row.channels + column.channel()];
      }
      std::fill_n(target.column_sums + group * width + b.begin, n, 0.0);
    }
    for (int64_t o = 0; o < points; o += kDepth) {
      const int64_t depth = std::min(points - o, kDepth);
      const bool finishes = sums && o + depth == points;
      Lanes lanes[kDepth / kWidth];
      find_lanes(op, o, depth, lanes);
      for (int64_t k = 0; k < n; k += kPanel) {
        gather_transposed(op, group_planes, b.begin + k, std::min(n - k, kPanel), lanes, depth,
                          panels + k / kPanel * panel_stride);
      }
      for (int64_t i = 0; i < per_group; ++i) {
        const int64_t low = tile_begin(op.row.rows, i), high = tile_begin(op.row.rows, i + 1);
        if (low < b.first || high > b.last) continue;
        float* to = c + (low - b.first) * stride;
        Ahead ahead[kGradientColumns / kPanel];
        for (int64_t k = 0; finishes && k < n; k += kPanel) {
          const int64_t at = (row + low) * width + b.begin + k;
          ahead[k / kPanel] =
              gradient_ahead(static_cast<const Weight*>(op.weight) + at,
                             target.gradient ? target.gradient + at : nullptr, width);
        }
        multiply_panels<false>(high - low, depth,
                               tiles + (group * per_group + i) * tile_size + o * kTileRows, panels,
                               panel_stride, to, stride, n, o > 0 || (!sums && target.accumulate),
                               ahead, finishes ? kGradientColumns / kPanel : 0);
        if (finishes) {
          finish_gradient<Weight>(op, target, to, stride, group, low, high, b,
                                  op.column_scale ? scales : nullptr);
        }
      }
    }
  }
}

void image(const Convolution& op, const float* planes, const float* x, float* u, double* squares,
           const Block& b, float* workspace) {
  (op.bfloat16 ? image_as<uint16_t> : image_as<float>)(op, planes, x, u, squares, b, workspace);
}

void adjoint(const Convolution& op, const float* panels, const float* u, float* x, double* squares,
             const Block& b, float* workspace) {
  (op.bfloat16 ? adjoint_as<uint16_t> : adjoint_as<float>)(op, panels, u, x, squares, b, workspace);
}

void gradient(const Convolution& op, const float* planes, const float* tiles,
              const GradientTarget& target, const Block& b, float* workspace) {
  (op.bfloat16 ? gradient_as<uint16_t> : gradient_as<float>)(op, planes, tiles, target, b,
                                                             workspace);
}

constexpr ConvolutionKernels kKernels{kTileRows, kPanel,  fill_planes, fill_panels,    fill_tiles,
                                      image,     adjoint, gradient,    sum_of_squares, multiply};
