// SPDX-License-Identifier: MIT
#include "ops/spectral.h"

#include <algorithm>
#include <string>
#include <vector>

namespace lmtfast {
namespace {

int64_t circle_entries(const lmtfast_op_row& row) { return 2 * row.axes; }

void require_in(bool ok, const char* expected, int64_t got, const char* field, int64_t index) {
  if (!ok) throw_invalid(expected, got, std::string(field) + "[" + std::to_string(index) + "]");
}

void require_tensor(const lmtfast_tensor* tensors, int64_t n, int64_t slot, int64_t size,
                    bool weight, const char* field, int64_t index) {
  require_in(slot >= 0 && slot < n, "a slot of the tensors", slot, field, index);
  const lmtfast_tensor& t = tensors[slot];
  require_in(t.data != nullptr, "a tensor with data", slot, field, index);
  require_in(t.dtype == LMTFAST_FLOAT32 || (weight && t.dtype == LMTFAST_BFLOAT16),
             weight ? "dtype float32 or bfloat16" : "dtype float32", t.dtype, field, index);
  require_in(t.size == size || (!weight && t.size == 1), "a tensor of the operator's size", t.size,
             field, index);
}

// Every size by itself, then their products, none of which may leave int64.
void require_sizes(const lmtfast_op_row& row, int64_t i) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  const auto size = [&](int64_t value, int64_t least, const char* field) {
    require_in(value >= least && value <= kMost,
               least > 0 ? "a size in [1, 2^31)" : "padding in [0, 2^31)", value, field, i);
    return static_cast<double>(value);
  };
  const double rows = size(row.groups, 1, "rows.groups") * size(row.rows, 1, "rows.rows");
  const double channels = size(row.channels, 1, "rows.channels");
  double in = 1.0, out = 1.0, kernel = 1.0, stride = 1.0;
  for (int axis = 0; axis < LMTFAST_OP_ROW_AXES; ++axis) {
    in *= size(row.in[axis], 1, "rows.in");
    out *= size(row.out[axis], 1, "rows.out");
    kernel *= size(row.kernel[axis], 1, "rows.kernel");
    stride *= size(row.stride[axis], 1, "rows.stride");
    size(row.dilation[axis], 1, "rows.dilation");
    size(row.pad_low[axis], 0, "rows.pad_low");
    size(row.pad_high[axis], 0, "rows.pad_high");
  }
  const double groups = static_cast<double>(row.groups);
  const double largest = std::max(
      {rows * channels * kernel * out, groups * channels * in, groups * channels * stride});
  require_in(largest < 0x1p56, "an operator of fewer than 2^56 products", row.rows, "rows", i);
}

void validate_row(const lmtfast_network& net, const lmtfast_tensor* tensors, int64_t n_tensors,
                  int64_t i) {
  const lmtfast_op_row& row = net.rows[i];
  require_in(row.engine >= LMTFAST_OPERATOR && row.engine <= LMTFAST_SEPARABLE, "engine 0, 1 or 2",
             row.engine, "rows.engine", i);
  require_in(row.axes >= 0 && row.axes <= LMTFAST_OP_ROW_AXES, "0 to 3 axes", row.axes, "rows.axes",
             i);
  require_in(row.axes > 0 || row.engine == LMTFAST_OPERATOR, "the operator engine for a matrix",
             row.engine, "rows.engine", i);
  require_sizes(row, i);
  for (int axis = 0; axis < LMTFAST_OP_ROW_AXES; ++axis) {
    require_in(!row.circular || std::max(row.pad_low[axis], row.pad_high[axis]) <= row.in[axis],
               "circular padding of at most the input", row.pad_low[axis], "rows.pad", i);
    const int64_t reach =
        row.stride[axis] * (row.out[axis] - 1) + row.dilation[axis] * (row.kernel[axis] - 1) + 1;
    require_in(reach <= row.in[axis] + row.pad_low[axis] + row.pad_high[axis],
               "an output that reads inside the padded input", row.out[axis], "rows.out", i);
    require_in(row.identity == 0.0 || row.pad_low[axis] / row.dilation[axis] < row.kernel[axis],
               "an identity at a tap of the kernel", row.pad_low[axis], "rows.pad_low", i);
  }
  require_in(
      row.rank == std::min({static_cast<int64_t>(LMTFAST_RANK), row.channels, volume(row.in)}),
      "rank min(8, channels, positions)", row.rank, "rows.rank", i);
  const auto inside = [&](int64_t offset, int64_t length, int64_t low, int64_t high) {
    return offset >= low && length <= high - offset;
  };
  require_in(inside(row.state_offset, state_entries(row), 0, net.state_size),
             "iterates inside the state", row.state_offset, "rows.state_offset", i);
  require_in(inside(row.saved_offset, saved_entries(row), net.scale_size, net.saved_size),
             "vectors inside the saved buffer", row.saved_offset, "rows.saved_offset", i);
  require_in(row.row_scale == -1 || inside(row.row_scale, row.groups * row.rows, 0, net.scale_size),
             "a stretch of the scale buffer", row.row_scale, "rows.row_scale", i);
  require_in(row.column_scale == -1 ||
                 inside(row.column_scale, row.groups * row.channels, 0, net.scale_size),
             "a stretch of the scale buffer", row.column_scale, "rows.column_scale", i);
  require_tensor(tensors, n_tensors, row.weight_slot, row.groups * row.rows * columns(row), true,
                 "rows.weight_slot", i);
}

}  // namespace

int64_t centre_tap(const lmtfast_op_row& row) {
  int64_t tap = 0;
  for (int axis = 0; axis < LMTFAST_OP_ROW_AXES; ++axis) {
    tap = tap * row.kernel[axis] + row.pad_low[axis] / row.dilation[axis];
  }
  return tap;
}

int64_t state_entries(const lmtfast_op_row& row) {
  switch (row.engine) {
    case LMTFAST_SYMBOL: {
      const int64_t width = circle_entries(row) + 2 * phases(row) * row.channels;
      return row.groups * (LMTFAST_CANDIDATES * width + circle_entries(row));
    }
    case LMTFAST_SEPARABLE:
      return row.groups * row.rank * (volume(row.in) + row.channels);
    default:
      return row.groups *
             (row.transposed ? row.rows * volume(row.out) : row.channels * volume(row.in));
  }
}

int64_t saved_entries(const lmtfast_op_row& row) {
  switch (row.engine) {
    case LMTFAST_SYMBOL:
      return 1 + 4 * row.rows + 2 * columns(row);
    case LMTFAST_SEPARABLE:
      return 2 + row.rank * (volume(row.in) + row.channels + row.rows * taps(row));
    default:
      return row.groups * (row.rows * volume(row.out) + row.channels * volume(row.in));
  }
}

void validate(const lmtfast_network& net, const lmtfast_tensor* tensors, int64_t n_tensors) {
  require(net.n_rows >= 0, "n_rows >= 0", net.n_rows, "n_rows");
  require(net.n_rows == 0 || net.rows, "non-null rows", 0, "rows");
  require(n_tensors >= 0, "n_tensors >= 0", n_tensors, "n_tensors");
  require(n_tensors == 0 || tensors, "non-null tensors", 0, "tensors");
  require(net.n_scales >= 0, "n_scales >= 0", net.n_scales, "n_scales");
  require(net.n_scales == 0 || net.scales, "non-null scales", 0, "scales");
  require(net.scale_size >= 0 && net.scale_size <= net.saved_size, "0 <= scale_size <= saved_size",
          net.scale_size, "scale_size");
  std::vector<char> weights(static_cast<size_t>(n_tensors));
  for (int64_t i = 0; i < net.n_rows; ++i) {
    const lmtfast_op_row& row = net.rows[i];
    require_in(row.kind >= LMTFAST_ELSEWHERE && row.kind <= LMTFAST_DIAGONAL, "kind 0, 1 or 2",
               row.kind, "rows.kind", i);
    if (row.kind == LMTFAST_STENCIL) {
      validate_row(net, tensors, n_tensors, i);
      weights[static_cast<size_t>(row.weight_slot)] = 1;
    }
    if (row.kind == LMTFAST_DIAGONAL) {
      require_in(row.groups == 1, "one group", row.groups, "rows.groups", i);
      require_in(row.rows >= 1 && row.row_scale >= 0 && row.rows <= net.scale_size - row.row_scale,
                 "a stretch of the scale buffer", row.row_scale, "rows.row_scale", i);
    }
  }
  for (int64_t i = 0; i < net.n_scales; ++i) {
    const lmtfast_scale_row& s = net.scales[i];
    require_in(s.offset >= 0 && s.length >= 0 && s.length <= net.scale_size - s.offset,
               "a stretch of the scale buffer", s.offset, "scales.offset", i);
    const auto require_scale = [&](int64_t slot, const char* field) {
      if (slot == -1) return;
      require_tensor(tensors, n_tensors, slot, s.length, false, field, i);
      // Gradients are written as those of weights or as those of scales.
      require_in(weights[static_cast<size_t>(slot)] == 0, "a tensor that is no operator's weight",
                 slot, field, i);
    };
    require_scale(s.slot, "scales.slot");
    require_scale(s.variance_slot, "scales.variance_slot");
  }
}

}  // namespace lmtfast
