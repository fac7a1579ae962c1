// SPDX-License-Identifier: MIT
// Included once per instruction set: vectors into packed operands, planes back into an input, and
// plain loops over floats.
#include "ops/cpu/product_tile.h"

// One line of a channel's plane from a line of the input (null: padding).
inline void fill_line(const Convolution& op, int64_t phase, const float* line, float factor,
                      float* to) {
  const StencilAxis& axis = op.stencil.axis[2];
  if (line == nullptr) {
    std::memset(to, 0, static_cast<size_t>(axis.extent) * sizeof(float));
  } else if (op.row.circular) {
    const int64_t* input = axis.input.data() + phase * axis.extent;
    for (int64_t e = 0; e < axis.extent; ++e) to[e] = input[e] < 0 ? 0.0f : factor * line[input[e]];
  } else {
    const auto [begin, length, first] = axis.segment[static_cast<size_t>(phase)];
    const int64_t step = op.row.stride[2], end = begin + length;
    for (int64_t e = 0; e < begin; ++e) to[e] = 0.0f;
    if (step == 1) {
      scale_floats(line + first, factor, to + begin, length);
    } else {
      for (int64_t e = 0; e < length; ++e) to[begin + e] = factor * line[first + step * e];
    }
    for (int64_t e = end; e < axis.extent; ++e) to[e] = 0.0f;
  }
}

// The reverse of fill_line: adds what the line's places hold to the inputs they read.
inline void add_line(const Convolution& op, int64_t phase, const float* from, float* line) {
  const StencilAxis& axis = op.stencil.axis[2];
  if (op.row.circular) {
    const int64_t* input = axis.input.data() + phase * axis.extent;
    for (int64_t e = 0; e < axis.extent; ++e) {
      if (input[e] >= 0) line[input[e]] += from[e];
    }
    return;
  }
  const auto [begin, length, first] = axis.segment[static_cast<size_t>(phase)];
  const int64_t step = op.row.stride[2];
  if (step == 1) {
    add_floats(from + begin, line + first, length);
  } else {
    for (int64_t e = 0; e < length; ++e) line[first + step * e] += from[begin + e];
  }
}

// Calls line(input line or -1, phase of the last axis, offset in the plane) for every line.
template <class Line>
void for_lines(const Convolution& op, Line&& line) {
  const StencilAxis* axis = op.stencil.axis;
  int64_t offset = 0;
  for (int64_t fz = 0; fz < axis[0].phases(); ++fz) {
    for (int64_t fy = 0; fy < axis[1].phases(); ++fy) {
      for (int64_t fx = 0; fx < axis[2].phases(); ++fx) {
        for (int64_t ez = 0; ez < axis[0].extent; ++ez) {
          const int64_t z = axis[0].input[static_cast<size_t>(fz * axis[0].extent + ez)];
          for (int64_t ey = 0; ey < axis[1].extent; ++ey, offset += axis[2].extent) {
            const int64_t y = axis[1].input[static_cast<size_t>(fy * axis[1].extent + ey)];
            line(z < 0 || y < 0 ? -1 : (z * op.row.in[1] + y) * op.row.in[2], fx, offset);
          }
        }
      }
    }
  }
}

void fill_planes(const Convolution& op, const float* x, bool scaled, float* planes, int64_t first,
                 int64_t last) {
  for (int64_t c = first; c < last; ++c) {
    const float factor = scaled && op.column_scale ? op.column_scale[c] : 1.0f;
    const float* channel = x + c * op.inputs();
    float* plane = planes + c * op.stencil.plane;
    if (op.stencil.plain) {
      scale_floats(channel, factor, plane, op.inputs());
      continue;
    }
    for_lines(op, [&](int64_t input, int64_t phase, int64_t offset) {
      fill_line(op, phase, input < 0 ? nullptr : channel + input, factor, plane + offset);
    });
  }
}

// One channel's plane back into the input.
void add_plane(const Convolution& op, const float* plane, float* x) {
  std::memset(x, 0, static_cast<size_t>(op.inputs()) * sizeof(float));
  for_lines(op, [&](int64_t input, int64_t phase, int64_t offset) {
    if (input >= 0) add_line(op, phase, plane + offset, x + input);
  });
}

// (groups, panels, rows, kPanel): the outputs of a panel side by side, zero beyond the last.
void fill_panels(const Convolution& op, const float* u, float* panels, int64_t first,
                 int64_t last) {
  const int64_t rows = op.row.rows, points = op.outputs();
  const int64_t count = (points + kPanel - 1) / kPanel;
  for (int64_t o = 0; o < points; o += kPanel) {
    const int64_t here = std::min(points - o, kPanel);
    for (int64_t r = first; r < last; ++r) {
      const float factor = op.row_scale ? op.row_scale[r] : 1.0f;
      if (points == 1) {
        panels[r] = factor * u[r];
        continue;
      }
      float* to = panels + ((r / rows * count + o / kPanel) * rows + r % rows) * kPanel;
      scale_floats(u + r * points + o, factor, to, here);
      for (int64_t j = here; j < kPanel; ++j) to[j] = 0.0f;
    }
  }
}

// (groups, row tiles, outputs, kTileRows), each tile with kSlack behind it.
void fill_tiles(const Convolution& op, const float* u, float factor, bool scaled, float* tiles,
                int64_t first, int64_t last) {
  const int64_t rows = op.row.rows, points = op.outputs();
  const int64_t per_group = (rows + kTileRows - 1) / kTileRows;
  const int64_t tile_size = points * kTileRows + kSlack;
  alignas(64) float square[kWidth * kWidth] = {}, turned[kWidth * kWidth];
  for (int64_t i = first; i < last; ++i) {
    const int64_t group = i / per_group, tile = i % per_group;
    const int64_t begin = tile_begin(rows, tile), end = tile_begin(rows, tile + 1);
    for (int64_t low = begin; low < end; low += kWidth) {
      const int64_t used = std::min(end - low, kWidth);
      for (int64_t o = 0; o < points; o += kWidth) {
        const int64_t here = std::min(points - o, kWidth);
        for (int64_t j = 0; j < used; ++j) {
          const int64_t r = group * rows + low + j;
          const float f = scaled && op.row_scale ? factor * op.row_scale[r] : factor;
          scale_floats(u + r * points + o, f, square + j * kWidth, here);
        }
        v::transpose(square, kWidth, turned, kWidth);
        float* to = tiles + i * tile_size + o * kTileRows + (low - begin);
        // Ascending, so that what spills over is overwritten.
        for (int64_t j = 0; j < here; ++j) {
          if (kTileRows <= kWidth) {
            v::store(to + j * kTileRows, v::load(turned + j * kWidth));
          } else {
            copy_floats(turned + j * kWidth, to + j * kTileRows, used);
          }
        }
      }
    }
  }
}

// Squares of floats neither overflow nor vanish in double; many sums hide the additions' latency.
double sum_of_squares(const float* x, int64_t n) {
  constexpr int64_t count = 32;
  double sums[count] = {};
  int64_t i = 0;
  for (; i + count <= n; i += count) {
    for (int64_t j = 0; j < count; ++j) {
      const double value = x[i + j];
      sums[j] += value * value;
    }
  }
  for (int64_t j = 0; i < n; ++i, ++j) sums[j] += static_cast<double>(x[i]) * x[i];
  for (int64_t half = count / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

void multiply(const float* x, double factor, float* y, int64_t n) {
  if (std::abs(factor) > 1e-30 && std::abs(factor) < 1e30) {
    scale_floats(x, static_cast<float>(factor), y, n);
  } else {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<float>(x[i] * factor);
  }
}
