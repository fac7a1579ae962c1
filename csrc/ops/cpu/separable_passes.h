// SPDX-License-Identifier: MIT
// Included once per instruction set, inside its namespace and target region, with `v` naming the
// vectors of core/simd.h, and Eight, Four and One the units that hold 8, 4 and 1 lanes.
//
// Weights are read as streams: the taps of a row, or one tap of several rows, that share a channel
// vector. Each entry of a stream is broadcast against it, so that a weight is loaded once for all
// patterns and nothing is transposed.

// Channels summed in registers before they join a row's total.
constexpr int64_t kRun = 128;
// Streams that are walked together: accumulators, a channel vector and a broadcast fill 16
// registers.
constexpr int kStreams = 9;
// Floats between a weight and the one that is fetched meanwhile: past the end of the page, where the
// processor's own prefetching stops.
constexpr int64_t kAhead = 512;

template <int kLaneCount>
struct UnitOf {
  using Type = Eight;
};
template <>
struct UnitOf<4> {
  using Type = Four;
};
template <>
struct UnitOf<1> {
  using Type = One;
};

inline void fetch(const float* p) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(p);
#else
  (void)p;
#endif
}

// What `kCount` streams of one step look like in memory.
struct Streams {
  const float* data;
  int64_t between;  // streams
  int64_t along;    // channels
};

template <int kLaneCount, int kCount>
void apply_streams(const Streams& w, int64_t channels, const float* a, float* y,
                   int64_t y_between) {
  using U = typename UnitOf<kLaneCount>::Type;
  constexpr int kParts = kLaneCount / U::kWidth;
  for (int64_t begin = 0; begin < channels; begin += kRun) {
    const int64_t end = begin + kRun < channels ? begin + kRun : channels;
    typename U::Vec sum[kCount][kParts];
#pragma GCC unroll 16
    for (int s = 0; s < kCount; ++s) {
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p) sum[s][p] = U::zero();
    }
    const float* at = w.data + begin * w.along;
    for (int64_t c = begin; c < end; ++c, at += w.along) {
      fetch(at + kAhead);
      typename U::Vec x[kParts];
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p) x[p] = U::load(a + c * kLaneCount + p * U::kWidth);
#pragma GCC unroll 16
      for (int s = 0; s < kCount; ++s) {
        const auto factor = U::broadcast(at[s * w.between]);
#pragma GCC unroll 8
        for (int p = 0; p < kParts; ++p) sum[s][p] = U::fma(factor, x[p], sum[s][p]);
      }
    }
#pragma GCC unroll 16
    for (int s = 0; s < kCount; ++s) {
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p) {
        float* to = y + s * y_between + p * U::kWidth;
        U::store(to, begin == 0 ? sum[s][p] : U::load(to) + sum[s][p]);
      }
    }
  }
}

template <int kLaneCount, int kCount>
void pull_streams(const Streams& w, int64_t channels, const float* m, int64_t m_between, float* b) {
  using U = typename UnitOf<kLaneCount>::Type;
  constexpr int kParts = kLaneCount / U::kWidth;
  typename U::Vec x[kCount][kParts];
#pragma GCC unroll 16
  for (int s = 0; s < kCount; ++s) {
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) x[s][p] = U::load(m + s * m_between + p * U::kWidth);
  }
  const float* at = w.data;
  for (int64_t c = 0; c < channels; ++c, at += w.along, b += kLaneCount) {
    fetch(at + kAhead);
    typename U::Vec sum[kParts];
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) sum[p] = U::load(b + p * U::kWidth);
#pragma GCC unroll 16
    for (int s = 0; s < kCount; ++s) {
      const auto factor = U::broadcast(at[s * w.between]);
#pragma GCC unroll 8
      for (int p = 0; p < kParts; ++p) sum[p] = U::fma(factor, x[s][p], sum[p]);
    }
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) U::store(b + p * U::kWidth, sum[p]);
  }
}

template <int kLaneCount>
struct Passes {
  using Apply = void (*)(const Streams&, int64_t, const float*, float*, int64_t);
  using Pull = void (*)(const Streams&, int64_t, const float*, int64_t, float*);

  template <size_t... kCount>
  static Apply apply_of(int64_t streams, std::index_sequence<kCount...>) {
    static constexpr Apply all[] = {apply_streams<kLaneCount, kCount + 1>...};
    return all[streams - 1];
  }
  template <size_t... kCount>
  static Pull pull_of(int64_t streams, std::index_sequence<kCount...>) {
    static constexpr Pull all[] = {pull_streams<kLaneCount, kCount + 1>...};
    return all[streams - 1];
  }

  // Calls body(streams, count, row, tap, whether the streams are taps) on sets that cover all rows
  // and taps.
  template <class Body>
  static void each_set(const KernelRows<const float>& w, Body&& body) {
    if (!w.tap_major && w.taps >= 3) {
      for (int64_t row = 0; row < w.rows; ++row) {
        for (int64_t tap = 0; tap < w.taps; tap += kStreams) {
          const int64_t count = w.taps - tap < kStreams ? w.taps - tap : kStreams;
          body(Streams{w.data + row * w.size() + tap, 1, w.taps}, count, row, tap, true);
        }
      }
      return;
    }
    const int64_t along = w.tap_major ? 1 : w.taps;
    const int64_t between = w.tap_major ? w.channels : 1;
    for (int64_t row = 0; row < w.rows; row += kStreams) {
      const int64_t count = w.rows - row < kStreams ? w.rows - row : kStreams;
      for (int64_t tap = 0; tap < w.taps; ++tap) {
        body(Streams{w.data + row * w.size() + tap * between, w.size(), along}, count, row, tap,
             false);
      }
    }
  }

  static void apply(const KernelRows<const float>& w, const float* a, float* y, int64_t width) {
    each_set(w, [&](const Streams& streams, int64_t count, int64_t row, int64_t tap, bool taps) {
      apply_of(count, std::make_index_sequence<kStreams>())(
          streams, w.channels, a, y + row * width + tap * kLaneCount, taps ? kLaneCount : width);
    });
  }
  static void pull(const KernelRows<const float>& w, const float* m, int64_t width, float* b) {
    each_set(w, [&](const Streams& streams, int64_t count, int64_t row, int64_t tap, bool taps) {
      pull_of(count, std::make_index_sequence<kStreams>())(
          streams, w.channels, m + row * width + tap * kLaneCount, taps ? kLaneCount : width, b);
    });
  }
};

void apply(const KernelRows<const float>& w, int64_t lanes, const float* a, float* y,
           int64_t width) {
  if (lanes == 8) return Passes<8>::apply(w, a, y, width);
  if (lanes == 4) return Passes<4>::apply(w, a, y, width);
  Passes<1>::apply(w, a, y, width);
}

void pull(const KernelRows<const float>& w, int64_t lanes, const float* m, int64_t width,
          float* b) {
  if (lanes == 8) return Passes<8>::pull(w, m, width, b);
  if (lanes == 4) return Passes<4>::pull(w, m, width, b);
  Passes<1>::pull(w, m, width, b);
}

// `from` (count, lanes) as columns (lanes, stride), with zeros behind them.
inline void to_columns(int64_t lanes, int64_t count, const float* from, float* to, int64_t stride) {
  for (int64_t k = 0; k < lanes; ++k) {
    for (int64_t i = 0; i < count; ++i) to[k * stride + i] = from[i * lanes + k];
    for (int64_t i = count; i < stride; ++i) to[k * stride + i] = 0.0f;
  }
}

inline void put(float* to, Vec x, int64_t count, bool add) {
  if (count >= v::kWidth) {
    v::store(to, add ? x + v::load(to) : x);
  } else {
    v::store_part(to, add ? x + v::load_part(to, count) : x, count);
  }
}

// One vector of taps of all channels: the columns stay in registers.
template <int kLaneCount>
void outer_taps(int64_t channels, const float* a, const float* columns, int64_t stride, float* to,
                int64_t taps, int64_t count, bool add) {
  Vec column[kLaneCount];
#pragma GCC unroll 8
  for (int k = 0; k < kLaneCount; ++k) column[k] = v::load(columns + k * stride);
  for (int64_t c = 0; c < channels; ++c, a += kLaneCount, to += taps) {
    // Two sums: half the wait for one another.
    Vec sum[2] = {v::zero(), v::zero()};
#pragma GCC unroll 8
    for (int k = 0; k < kLaneCount; ++k) {
      sum[k % 2] = v::fma(v::broadcast(a[k]), column[k], sum[k % 2]);
    }
    put(to, sum[0] + sum[1], count, add);
  }
}

// All channels of one tap: the factors stay in registers.
template <int kLaneCount>
void outer_channels(int64_t channels, const float* factors, const float* columns, int64_t stride,
                    float* to, bool add) {
  Vec factor[kLaneCount];
#pragma GCC unroll 8
  for (int k = 0; k < kLaneCount; ++k) factor[k] = v::broadcast(factors[k]);
  for (int64_t c = 0; c < channels; c += v::kWidth) {
    Vec sum[2] = {v::zero(), v::zero()};
#pragma GCC unroll 8
    for (int k = 0; k < kLaneCount; ++k) {
      sum[k % 2] = v::fma(factor[k], v::load(columns + k * stride + c), sum[k % 2]);
    }
    put(to + c, sum[0] + sum[1], channels - c, add);
  }
}

template <int kLaneCount>
void outer_lanes(const KernelRows<float>& g, const float* m, int64_t width, const float* a,
                 bool add) {
  const bool along_taps = !g.tap_major && g.taps >= 2;
  const int64_t length = along_taps ? g.taps : g.channels;
  const int64_t stride = (length + v::kWidth - 1) / v::kWidth * v::kWidth;
  Buffer<float> columns(kLaneCount * stride);
  if (!along_taps) to_columns(kLaneCount, g.channels, a, columns.data(), stride);
  for (int64_t row = 0; row < g.rows; ++row) {
    float* to = g.data + row * g.size();
    const float* taps = m + row * width;
    if (along_taps) {
      to_columns(kLaneCount, g.taps, taps, columns.data(), stride);
      for (int64_t t = 0; t < g.taps; t += v::kWidth) {
        outer_taps<kLaneCount>(g.channels, a, columns.data() + t, stride, to + t, g.taps,
                               g.taps - t, add);
      }
    } else {
      for (int64_t t = 0; t < g.taps; ++t) {
        outer_channels<kLaneCount>(g.channels, taps + t * kLaneCount, columns.data(), stride,
                                   to + t * g.channels, add);
      }
    }
  }
}

void outer(const KernelRows<float>& g, int64_t lanes, const float* m, int64_t width, const float* a,
           bool add) {
  if (lanes == 8) return outer_lanes<8>(g, m, width, a, add);
  if (lanes == 4) return outer_lanes<4>(g, m, width, a, add);
  outer_lanes<1>(g, m, width, a, add);
}

void widen(int64_t size, const uint16_t* from, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) to[i] = simd::widen_bfloat16(from[i]);
}
