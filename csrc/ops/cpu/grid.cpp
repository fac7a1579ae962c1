// SPDX-License-Identifier: MIT
#include "ops/cpu/grid.h"

#include <algorithm>
#include <limits>

#include "ops/spectral.h"

namespace lmtfast::cpu {
namespace {

constexpr int kAxes = LMTFAST_OP_ROW_AXES;

// The input that a padded position of one axis holds, -1 outside.
int64_t input_at(const lmtfast_op_row& row, int axis, int64_t padded) {
  const int64_t n = row.in[axis], at = padded - row.pad_low[axis];
  if (at >= 0 && at < n) return at;
  if (!row.circular) return -1;
  return at < 0 ? at + n : at - n;
}

template <int kLaneCount>
void gather_point(const float* h, const int32_t* source, const std::vector<int32_t>& offset,
                  float factor, float* to) {
  for (const int32_t at : offset) {
    const float* from = h + static_cast<int64_t>(source[at]) * kLaneCount;
#pragma omp simd
    for (int k = 0; k < kLaneCount; ++k) to[k] = factor * from[k];
    to += kLaneCount;
  }
}

}  // namespace

Grid::Grid(const lmtfast_op_row& row) : inputs_(volume(row.in)) {
  int64_t padded[kAxes];
  for (int axis = 0; axis < kAxes; ++axis) {
    padded[axis] = row.in[axis] + row.pad_low[axis] + row.pad_high[axis];
  }
  require(volume(padded) < std::numeric_limits<int32_t>::max(), "fewer than 2^31 padded positions",
          volume(padded), "rows.in");
  const auto place = [](const int64_t* extent, const int64_t* at) {
    return static_cast<int32_t>((at[0] * extent[1] + at[1]) * extent[2] + at[2]);
  };
  const auto each = [](const int64_t* extent, auto&& body) {
    int64_t at[kAxes];
    for (at[0] = 0; at[0] < extent[0]; ++at[0]) {
      for (at[1] = 0; at[1] < extent[1]; ++at[1]) {
        for (at[2] = 0; at[2] < extent[2]; ++at[2]) body(at);
      }
    }
  };
  source_.reserve(static_cast<size_t>(volume(padded)));
  each(padded, [&](const int64_t* at) {
    int64_t input[kAxes];
    bool inside = true;
    for (int axis = 0; axis < kAxes; ++axis) {
      input[axis] = input_at(row, axis, at[axis]);
      inside = inside && input[axis] >= 0;
    }
    source_.push_back(inside ? place(row.in, input) : static_cast<int32_t>(inputs_));
  });
  const auto places = [&](const int64_t* extent, const int64_t* step, std::vector<int32_t>& to) {
    to.reserve(static_cast<size_t>(volume(extent)));
    each(extent, [&](const int64_t* at) {
      const int64_t reached[] = {at[0] * step[0], at[1] * step[1], at[2] * step[2]};
      to.push_back(place(padded, reached));
    });
  };
  places(row.out, row.stride, first_);
  places(row.kernel, row.dilation, offset_);
  for (int axis = 0; axis < kAxes; ++axis) {
    std::vector<std::vector<Sight>> seen(static_cast<size_t>(row.in[axis]));
    for (int64_t o = 0; o < row.out[axis]; ++o) {
      for (int64_t t = 0; t < row.kernel[axis]; ++t) {
        const int64_t i = input_at(row, axis, row.stride[axis] * o + row.dilation[axis] * t);
        if (i >= 0) seen[i].push_back({static_cast<int32_t>(o), static_cast<int32_t>(t)});
      }
    }
    Axis found{{0}, {}, 0, row.out[axis], row.kernel[axis]};
    for (const auto& sights : seen) {
      found.most = std::max(found.most, sights.size());
      found.sights.insert(found.sights.end(), sights.begin(), sights.end());
      found.begin.push_back(static_cast<int32_t>(found.sights.size()));
    }
    axes_.push_back(std::move(found));
  }
}

void Grid::gather(const float* h, int64_t lanes, float factor, int64_t begin, int64_t end,
                  float* windows, int64_t width) const {
  const auto gather_lanes = lanes == 8   ? gather_point<8>
                            : lanes == 4 ? gather_point<4>
                                         : gather_point<1>;
  const int64_t held = lanes * static_cast<int64_t>(offset_.size());
  for (int64_t o = begin; o < end; ++o, windows += width) {
    gather_lanes(h, source_.data() + first_[o], offset_, factor, windows);
    for (int64_t i = held; i < width; ++i) windows[i] = 0.0f;
  }
}

void Grid::fold(const SeparableKernels& kernels, const float* windows, int64_t width, int64_t lanes,
                int64_t begin, int64_t end, float* h) const {
  const Axis &depth = axes_[0], &rows = axes_[1], &columns = axes_[2];
  const int64_t extent[] = {static_cast<int64_t>(rows.begin.size()) - 1,
                            static_cast<int64_t>(columns.begin.size()) - 1};
  // What all inputs of one line see: the first tap of a line of windows.
  std::vector<const float*> lines, terms;
  int64_t line = -1;
  for (int64_t i = begin; i < end; ++i) {
    if (i / extent[1] != line) {
      line = i / extent[1];
      lines.clear();
      const int64_t slab = line / extent[0], row = line % extent[0];
      for (int32_t d = depth.begin[slab]; d < depth.begin[slab + 1]; ++d) {
        for (int32_t r = rows.begin[row]; r < rows.begin[row + 1]; ++r) {
          const Sight &far = depth.sights[d], &near = rows.sights[r];
          const int64_t point = (far.point * rows.points + near.point) * columns.points;
          lines.push_back(windows + point * width +
                          (far.tap * rows.taps + near.tap) * columns.taps * lanes);
        }
      }
      terms.resize(lines.size() * columns.most);
    }
    const int64_t column = i % extent[1];
    int64_t count = 0;
    for (int32_t c = columns.begin[column]; c < columns.begin[column + 1]; ++c) {
      const int64_t at = columns.sights[c].point * width + columns.sights[c].tap * lanes;
      for (const float* first : lines) terms[count++] = first + at;
    }
    kernels.add(count, terms.data(), lanes, h + i * lanes);
  }
}

}  // namespace lmtfast::cpu
