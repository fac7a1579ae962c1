// SPDX-License-Identifier: MIT
// Included once per instruction set, inside its namespace and target region, with `v` naming the
// vectors of core/simd.h: register tiles of a matrix product, and the packing of their operands.
//
// A tile is kTileRows x kPanel numbers of C = A B, summed over up to kDepth in registers. B lies in
// panels (depth, kPanel). A is either staged, rows of stride kStage, or packed (depth, kTileRows).

using Vec = v::Vec;
constexpr int64_t kWidth = v::kWidth;
constexpr int64_t kTileRows = v::kTileRows;
constexpr int64_t kPanel = 2 * kWidth;
// Not a power of two: rows of a staged tile must not meet in the same cache sets.
constexpr int64_t kStage = kDepth + 16;

// Cache lines to fetch while a tile multiplies, one per step in depth: group[i / kAhead] + step * (i %
// kAhead) bytes.
constexpr int64_t kAhead = 16;
struct Ahead {
  int64_t step;
  const char* group[kDepth / kAhead];

  Ahead() = default;
  // Lines `step` bytes apart, groups `next` bytes apart.
  Ahead(const void* start, int64_t step_bytes, int64_t next) : step(step_bytes) {
    for (const char*& g : group) {
      g = static_cast<const char*>(start) + (&g - group) * next;
    }
  }
};

// C (kRows, columns) = or += A B. `columns` fills kVectors vectors but for a part of the last.
template <int kRows, int kVectors, bool kStaged>
void tile(int64_t depth, const float* a, const float* b, float* c, int64_t stride, int64_t columns,
          bool add, const Ahead& ahead) {
  constexpr int64_t row_step = kStaged ? kStage : 1;
  constexpr int64_t depth_step = kStaged ? 1 : kTileRows;
  Vec sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = v::zero();
      LMTFAST_FETCH(c + i * stride + j * kWidth);
    }
    LMTFAST_FETCH(c + i * stride + columns - 1);
  }
  for (int64_t begin = 0; begin < depth; begin += kAhead) {
    const char* line = ahead.group[begin / kAhead];
    const int64_t end = std::min(depth, begin + kAhead);
    for (int64_t k = begin; k < end; ++k, a += depth_step, b += kPanel, line += ahead.step) {
      LMTFAST_FETCH(line);
      Vec right[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) right[j] = v::load(b + j * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec left = v::broadcast(a[i * row_step]);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sum[i][j] = v::fma(left, right[j], sum[i][j]);
      }
    }
  }
  const int64_t last = columns - (kVectors - 1) * kWidth;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i, c += stride) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + j * kWidth;
      if (j < kVectors - 1 || last == kWidth) {
        v::store(to, add ? sum[i][j] + v::load(to) : sum[i][j]);
      } else {
        v::store_part(to, add ? sum[i][j] + v::load_part(to, last) : sum[i][j], last);
      }
    }
  }
}

using Tile = void (*)(int64_t, const float*, const float*, float*, int64_t, int64_t, bool,
                      const Ahead&);

template <bool kStaged, size_t... kRows>
Tile tile_of(int64_t rows, int64_t vectors, std::index_sequence<kRows...>) {
  static constexpr Tile tiles[2][kTileRows] = {{tile<kRows + 1, 1, kStaged>...},
                                               {tile<kRows + 1, 2, kStaged>...}};
  return tiles[vectors - 1][rows - 1];
}

// The columns [0, columns) of a tile's product with successive panels of stride `panel_stride`;
// panel i fetches ahead[i], the last of them `fetches`.
template <bool kStaged>
void multiply_panels(int64_t rows, int64_t depth, const float* a, const float* b,
                     int64_t panel_stride, float* c, int64_t stride, int64_t columns, bool add,
                     const Ahead* ahead, int64_t fetches) {
  constexpr auto all = std::make_index_sequence<kTileRows>();
  const Ahead nothing(a, 0, 0);
  for (int64_t n = 0; n < columns; n += kPanel, b += panel_stride, ++ahead, --fetches) {
    const int64_t count = std::min(columns - n, kPanel);
    const int64_t vectors = (count + kWidth - 1) / kWidth;
    tile_of<kStaged>(rows, vectors, all)(depth, a, b, c + n, stride, count, add,
                                         fetches > 0 ? *ahead : nothing);
  }
}

// First row of tile i when `rows` are shared out among as few tiles as hold them.
inline int64_t tile_begin(int64_t rows, int64_t i) {
  return rows * i / ((rows + kTileRows - 1) / kTileRows);
}

template <class Weight>
void copy_floats(const Weight* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) v::store(to + i, v::load(from + i));
  if (i < n) v::store_part(to + i, v::load_part(from + i, n - i), n - i);
}

// Rows of W at a depth range, as they are.
template <class Weight>
void stage_rows(const Weight* w, int64_t stride, int64_t rows, int64_t depth, float* staged) {
  for (int64_t i = 0; i < rows; ++i) copy_floats(w + i * stride, staged + i * kStage, depth);
}

// Columns [0, count) of W at a range of rows, tile by tile (kDepth, kTileRows), each with kSlack.
constexpr int64_t kPackedTile = kDepth * kTileRows + kSlack;
template <class Weight>
void pack_columns(const Weight* w, int64_t stride, int64_t count, int64_t depth, float* packed) {
  // A few rows at a time, so that lines that tiles share are still at hand.
  constexpr int64_t few = 8, line = 64 / sizeof(Weight);
  for (int64_t k = 0; k < depth; k += few, w += few * stride, packed += few * kTileRows) {
    const int64_t here = std::min(depth - k, few);
    for (int64_t i = 0, low = 0; low < count; ++i) {
      const int64_t high = tile_begin(count, i + 1), used = high - low;
      float* to = packed + i * kPackedTile;
      const Weight* from = w + low;
      for (int64_t r = 0; r < here; ++r, to += kTileRows, from += stride) {
        LMTFAST_FETCH(from + few * stride + line / 2);
        if (used < kWidth) {
          v::store(to, v::load_part(from, used));
        } else if (used == kWidth) {
          v::store(to, v::load(from));
        } else {
          copy_floats(from, to, used);
        }
      }
      low = high;
    }
  }
}

// Where one vector of outputs lies in the planes: runs from ascending lanes on, the places of lane
// 0 being place - lane.
struct Lanes {
  int64_t count;
  Run runs[kWidth];
};

inline void find_lanes(const Convolution& op, int64_t begin, int64_t count, Lanes* lanes) {
  for (int64_t n = 0; n < count; n += kWidth, ++lanes) {
    const int64_t here = std::min(count - n, kWidth);
    lanes->count = find_runs(op.row, op.stencil, begin + n, here, kWidth, lanes->runs);
  }
}

// kRuns runs, or any number if that is 0. A single run is not read beyond its end: it may lie at the
// end of a caller's buffer.
template <int kRuns = 0>
inline Vec load_lanes(const float* plane, const Lanes& lanes) {
  const Run& first = lanes.runs[0];
  const int64_t count = kRuns > 0 ? kRuns : lanes.count;
  if (count == 1 && first.length < kWidth) return v::load_part(plane + first.place, first.length);
  Vec x = v::load(plane + first.place);
  for (int64_t i = 1; i < count; ++i) {
    const Run& run = lanes.runs[i];
    x = v::load_from(x, run.lane, plane + run.place - run.lane);
  }
  return x;
}

// Walks the columns of one group's W in memory order and says where their inputs lie.
class Columns {
 public:
  Columns(const Convolution& op, int64_t k)
      : op_(op), taps_(taps(op.row)), channels_(op.row.channels) {
    channel_ = op.tap_major ? k % channels_ : k / taps_;
    tap_ = op.tap_major ? k / channels_ : k % taps_;
  }
  int64_t channel() const { return channel_; }
  int64_t tap() const { return tap_; }
  int64_t offset() const {
    return channel_ * op_.stencil.plane + op_.stencil.tap_offset[static_cast<size_t>(tap_)];
  }
  void next() {
    if (op_.tap_major) {
      if (++channel_ == channels_) channel_ = 0, ++tap_;
    } else {
      if (++tap_ == taps_) tap_ = 0, ++channel_;
    }
  }

 private:
  const Convolution& op_;
  int64_t taps_, channels_, channel_, tap_;
};

template <int kFirst, int kSecond>
void gather_two(Columns column, const float* planes, int64_t depth, const Lanes* lanes,
                float* panel) {
  for (int64_t i = 0; i < depth; ++i, column.next(), panel += kPanel) {
    const float* plane = planes + column.offset();
    v::store(panel, load_lanes<kFirst>(plane, lanes[0]));
    v::store(panel + kWidth, load_lanes<kSecond>(plane, lanes[1]));
  }
}

// A panel (depth, kPanel) of X: columns of W from `k` on, at a panel of outputs.
inline void gather_panel(const Convolution& op, const float* planes, int64_t k, int64_t depth,
                         const Lanes* lanes, int64_t vectors, float* panel) {
  Columns column(op, k);
  if (vectors == 2 && lanes[0].count <= 2 && lanes[1].count <= 2) {
    const auto gather = lanes[0].count == 1
                            ? (lanes[1].count == 1 ? gather_two<1, 1> : gather_two<1, 2>)
                            : (lanes[1].count == 1 ? gather_two<2, 1> : gather_two<2, 2>);
    return gather(column, planes, depth, lanes, panel);
  }
  for (int64_t i = 0; i < depth; ++i, column.next(), panel += kPanel) {
    const float* plane = planes + column.offset();
    for (int64_t j = 0; j < vectors; ++j) v::store(panel + j * kWidth, load_lanes(plane, lanes[j]));
  }
}

// A panel (outputs, kPanel) of X^T: `columns` columns of W from `k` on, the others arbitrary.
inline void gather_transposed(const Convolution& op, const float* planes, int64_t k,
                              int64_t columns, const Lanes* lanes, int64_t outputs, float* panel) {
  alignas(64) float square[kWidth * kWidth] = {};
  for (int64_t half = 0; half < kPanel && half < columns; half += kWidth) {
    int64_t offsets[kWidth];
    const int64_t used = std::min(columns - half, kWidth);
    Columns column(op, k + half);
    for (int64_t j = 0; j < used; ++j, column.next()) offsets[j] = column.offset();
    for (int64_t o = 0, block = 0; o < outputs; o += kWidth, ++block) {
      for (int64_t j = 0; j < used; ++j) {
        v::store(square + j * kWidth, load_lanes(planes + offsets[j], lanes[block]));
      }
      v::transpose(square, kWidth, panel + o * kPanel + half, kPanel);
    }
  }
}

// y += x
inline void add_floats(const float* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) v::store(y + i, v::load(y + i) + v::load(x + i));
  if (i < n) v::store_part(y + i, v::load_part(y + i, n - i) + v::load_part(x + i, n - i), n - i);
}

// y = factor x
inline void scale_floats(const float* x, float factor, float* y, int64_t n) {
  const Vec f = v::broadcast(factor);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) v::store(y + i, f * v::load(x + i));
  if (i < n) v::store_part(y + i, f * v::load_part(x + i, n - i), n - i);
}
