// SPDX-License-Identifier: MIT
// The symbol engine's step on the CPU: z per group, one pass over the weights in tiles of rows,
// then frequencies and vectors per group, then the winner per operator. Vectors of all candidates
// lie together, as the columns (candidate, re or im) of a panel.
#include "ops/cpu/symbol.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/buffer.h"
#include "core/parallel.h"

namespace lmtfast::cpu {
namespace {

static_assert(kPanelColumns == 2 * kCandidates);

// The explorer has settled when one power step gains less than this fraction.
constexpr double kStalled = 1e-3;
// Powers of the inverse root of x^(axes + 1) = x + 1 space the explorer's frequencies.
constexpr double kRoots[] = {1.0, 1.6180339887498949, 1.3247179572447461, 1.2207440846057596};
// Weights of one tile: few enough to spread over many cores, and so many that a tile's sums, which
// are as long as eight rows, are a small part of what it reads.
constexpr int64_t kTileWeights = 1 << 19;
constexpr int64_t kLeastTileRows = 64;
constexpr int64_t kWeightsPerThread = 1 << 14;
void norms(const SymbolRun& run, SymbolPart& part) {
  double squares[kCandidates] = {}, y[kPanelColumns];
  for (int64_t r = 0; r < run.ops[part.op].row->rows; ++r) {
    image(run, part, r, y);
    for (int k = 0; k < kPanelColumns; ++k) squares[k / 2] += y[k] * y[k];
  }
  for (int f = 0; f < kCandidates; ++f) part.values[f] = std::sqrt(squares[f]);
}

// Adds up the tiles of a part in the first one's sums, in order; returns its powers of two.
void reduce(SymbolRun& run, const SymbolPart& part) {
  SymbolTile& total = run.tiles[part.first_tile];
  const int64_t blocks = run.ops[part.op].blocks;
  int top[kCandidates];
  std::copy_n(total.exponent, kCandidates, top);
  for (int64_t i = part.first_tile; i < part.end_tile; ++i) {
    for (int f = 0; f < kCandidates; ++f) top[f] = std::max(top[f], run.tiles[i].exponent[f]);
  }
  for (int64_t i = part.first_tile; i < part.end_tile; ++i) {
    const SymbolTile& tile = run.tiles[i];
    float factor[kCandidates];
    for (int f = 0; f < kCandidates; ++f) {
      factor[f] = static_cast<float>(std::ldexp(1.0, tile.exponent[f] - top[f]));
    }
    for (int64_t b = 0; b < blocks; ++b) {
      for (int f = 0; f < kCandidates; ++f) {
        const int64_t at = b * kPanelBlock + 2 * f * kBlock;
        for (int j = 0; j < 2 * kBlock; ++j) {
          const float share = factor[f] * tile.sums[at + j];
          total.sums[at + j] = &tile == &total ? share : total.sums[at + j] + share;
        }
      }
    }
  }
  std::copy_n(top, kCandidates, total.exponent);
}

// W^H u of one candidate at every channel and tap, linear and in the order of the weights, and the
// image's rows that the identity takes to the centre tap; all over the power of two of the sums.
struct Taps {
  Buffer<float> re, im;
  double power;

  Taps(const SymbolRun& run, const SymbolPart& part)
      : re(run.ops[part.op].blocks * kBlock), im(run.ops[part.op].blocks * kBlock), power(1.0) {}

  void read(const SymbolRun& run, const SymbolPart& part, int f) {
    const SymbolOperator& op = run.ops[part.op];
    const SymbolTile& total = run.tiles[part.first_tile];
    power = std::ldexp(1.0, total.exponent[f]);
    read_column(total.sums, op.blocks, 2 * f, re.data());
    read_column(total.sums, op.blocks, 2 * f + 1, im.data());
    for (int64_t c = 0; c < op.row->channels; ++c) {
      const float scale =
          op.column_scale ? op.column_scale[part.group * op.row->channels + c] : 1.0f;
      for (int64_t t = 0; t < op.spectrum.taps() && op.column_scale; ++t) {
        re.data()[op.at(c, t)] *= scale;
        im.data()[op.at(c, t)] *= scale;
      }
      if (part.centre && c < op.row->rows) {
        double y[kPanelColumns];
        image(run, part, c, y);
        const double share = op.row->identity / power;
        re.data()[op.at(c, op.centre)] += static_cast<float>(share * y[2 * f]);
        im.data()[op.at(c, op.centre)] += static_cast<float>(share * y[2 * f + 1]);
      }
    }
  }
};

// A candidate's vector A(w)^H u, unnormalised, at x (P C, 2).
void gather(const SymbolOperator& op, const Taps& taps, const Complex* terms, int f, float* x) {
  const int64_t channels = op.row->channels;
  std::fill(x, x + 2 * op.width, 0.0f);
  for (int64_t t = 0; t < op.spectrum.taps(); ++t) {
    float* block = x + 2 * op.spectrum.phase(t) * channels;
    const float er = static_cast<float>(terms[t].re[f]), ei = static_cast<float>(terms[t].im[f]);
    for (int64_t c = 0; c < channels; ++c) {
      const float re = taps.re.data()[op.at(c, t)], im = taps.im.data()[op.at(c, t)];
      block[2 * c] += er * re + ei * im;
      block[2 * c + 1] += er * im - ei * re;
    }
  }
}

// Lets a stalled explorer, the last candidate, replace a worse one and start at the next frequency.
void explore(const SymbolOperator& op, const double* before, const double* after, double* anchor,
             Frequencies& w, float* const* x) {
  constexpr int kExplorer = kCandidates - 1;
  if (!(after[kExplorer] <= before[kExplorer] * (1.0 + kStalled))) return;
  const bool ordered = std::none_of(after, after + kExplorer, [](double v) { return v != v; });
  const auto worst = std::min_element(after, after + kExplorer) - after;
  const int64_t size = 2 * op.width;
  if (ordered && after[kExplorer] > after[worst]) {
    for (int64_t a = 0; a < op.row->axes; ++a) w[a][worst] = w[a][kExplorer];
    std::copy_n(x[kExplorer], size, x[worst]);
  }
  double step = 2 * std::numbers::pi;
  for (int64_t a = 0; a < op.row->axes; ++a) {
    step /= kRoots[op.row->axes];
    anchor[a] += step;
    w[a][kExplorer] = anchor[a];
  }
  // A shifted singular vector is as good a start as a random one, and costs no generator.
  std::rotate(x[kExplorer], x[kExplorer] + size - 2, x[kExplorer] + size);
}

// The new iterates of a group, from its tiles' sums.
void advance(SymbolRun& run, SymbolPart& part) {
  const SymbolOperator& op = run.ops[part.op];
  const int64_t channels = op.row->channels, axes = op.row->axes, n_taps = op.spectrum.taps();
  reduce(run, part);
  std::vector<Complex> work(static_cast<size_t>(n_taps));
  Taps taps(run, part);
  for (int f = 0; f < kCandidates; ++f) {
    taps.read(run, part, f);
    for (int64_t t = 0; t < n_taps; ++t) {
      const float* x = part.x + 2 * (f * op.width + op.spectrum.phase(t) * channels);
      double re = 0.0, im = 0.0;
      for (int64_t c = 0; c < channels; ++c) {
        const double ar = taps.re.data()[op.at(c, t)], ai = taps.im.data()[op.at(c, t)];
        const double xr = x[2 * c], xi = x[2 * c + 1];
        re += ar * xr + ai * xi;
        im += ar * xi - ai * xr;
      }
      work[t].re[f] = re;
      work[t].im[f] = im;
    }
  }
  Frequencies w;
  std::copy_n(&part.w[0][0], axes * kCandidates, &w[0][0]);
  op.spectrum.improve(work.data(), w);
  op.spectrum.terms(w, work.data());
  float* x[kCandidates];
  double reached[kCandidates];
  for (int f = 0; f < kCandidates; ++f) {
    x[f] = run.call.new_state + op.slot(part.group, f) + 2 * axes;
    taps.read(run, part, f);
    gather(op, taps, work.data(), f, x[f]);
    reached[f] = unit_length(x[f], 2 * op.width) * taps.power;
    if (part.values[f] > 0) reached[f] /= part.values[f];
    if (!(reached[f] > 0 && std::isfinite(reached[f]))) {
      for (int64_t a = 0; a < axes; ++a) w[a][f] = part.w[a][f];
      std::copy_n(part.x + f * 2 * op.width, 2 * op.width, x[f]);
    }
  }
  const int64_t end = op.slot(part.group, kCandidates);
  double anchor[LMTFAST_OP_ROW_AXES];
  for (int64_t a = 0; a < axes; ++a) {
    anchor[a] = std::atan2(run.call.state[end + 2 * a + 1], run.call.state[end + 2 * a]);
  }
  explore(op, part.values, reached, anchor, w, x);
  for (int64_t a = 0; a < axes; ++a) {
    for (int f = 0; f < kCandidates; ++f) {
      float* circle = run.call.new_state + op.slot(part.group, f) + 2 * a;
      circle[0] = static_cast<float>(std::cos(w[a][f]));
      circle[1] = static_cast<float>(std::sin(w[a][f]));
    }
    run.call.new_state[end + 2 * a] = static_cast<float>(std::cos(anchor[a]));
    run.call.new_state[end + 2 * a + 1] = static_cast<float>(std::sin(anchor[a]));
  }
  const int64_t begin = op.slot(part.group, 0), size = op.slot(part.group + 1, 0) - begin;
  float* fresh = run.call.new_state + begin;
  if (!std::all_of(fresh, fresh + size, [](float v) { return std::isfinite(v); })) {
    std::copy_n(run.call.state + begin, size, fresh);
  }
}

// Sigma of an operator and the vectors of its best candidate.
void record(const SymbolRun& run, const SymbolOperator& op) {
  const SymbolPart* best = nullptr;
  int winner = 0;
  for (int64_t g = 0; g < op.row->groups; ++g) {
    const SymbolPart& part = run.parts[op.first_part + g];
    for (int f = 0; f < kCandidates; ++f) {
      // What is not a number wins, so that it shows.
      if (best && !(part.values[f] > best->values[winner]) &&
          !(part.values[f] != part.values[f] && best->values[winner] == best->values[winner])) {
        continue;
      }
      best = &part;
      winner = f;
    }
  }
  const double sigma = best->values[winner];
  run.call.sigmas[op.index] = static_cast<float>(sigma);
  SymbolSaved saved(*op.row, run.call.saved);
  *saved.group = static_cast<float>(best->group);
  for (int64_t r = 0; r < op.row->rows; ++r) {
    double y[kPanelColumns];
    image(run, *best, r, y);
    for (int part = 0; part < 2; ++part) {
      const int k = 2 * winner + part;
      saved.u[2 * r + part] = static_cast<float>(y[k] / (sigma == 0.0 ? 1.0 : sigma));
      saved.p[2 * r + part] = best->images[r * kPanelColumns + k];
    }
  }
  for (int64_t t = 0; t < op.spectrum.taps(); ++t) {
    const float* x = best->x + 2 * (winner * op.width + op.spectrum.phase(t) * op.row->channels);
    const float er = static_cast<float>(best->terms[t].re[winner]);
    const float ei = static_cast<float>(best->terms[t].im[winner]);
    for (int64_t c = 0; c < op.row->channels; ++c) {
      float* z = saved.z + 2 * (c * op.spectrum.taps() + t);
      z[0] = er * x[2 * c] - ei * x[2 * c + 1];
      z[1] = er * x[2 * c + 1] + ei * x[2 * c];
    }
  }
}

// Groups and their tiles, without memory.
void plan(SymbolRun& run) {
  for (SymbolOperator& op : run.ops) {
    op.first_part = static_cast<int64_t>(run.parts.size());
    const int64_t wanted = std::max(kLeastTileRows, kTileWeights / op.columns);
    const int64_t tiles = (op.row->rows + wanted - 1) / wanted;
    for (int64_t g = 0; g < op.row->groups; ++g) {
      SymbolPart part{};
      part.op = &op - run.ops.data();
      part.group = g;
      part.first_tile = static_cast<int64_t>(run.tiles.size());
      part.end_tile = part.first_tile + tiles;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t begin = op.row->rows * i / tiles, end = op.row->rows * (i + 1) / tiles;
        run.tiles.push_back({static_cast<int64_t>(run.parts.size()), begin, end, {}, nullptr});
      }
      run.parts.push_back(part);
    }
  }
}

// Hands out scratch, or, from null, counts the floats it takes.
int64_t place(SymbolRun& run, float* scratch, Complex* terms) {
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    float* at = scratch ? scratch + used : nullptr;
    used += blocks_of(n) * kBlock;
    return at;
  };
  for (SymbolPart& part : run.parts) {
    const SymbolOperator& op = run.ops[part.op];
    part.x = take(kCandidates * 2 * op.width);
    part.panel = take(op.blocks * kPanelBlock);
    part.images = take(op.row->rows * kPanelColumns);
    if (op.row->identity != 0.0) {
      part.centre = take(op.row->rows * kPanelColumns);
      if (scratch) std::fill(part.centre, part.centre + op.row->rows * kPanelColumns, 0.0f);
    }
    part.terms = terms;
    if (terms) terms += op.spectrum.taps();
  }
  for (SymbolTile& tile : run.tiles) {
    if (run.call.new_state) tile.sums = take(run.ops[run.parts[tile.part].op].blocks * kPanelBlock);
  }
  return used;
}

}  // namespace

void symbol_step(const SpectralStep& call) {
  SymbolRun run{call, {}, {}, {}};
  int64_t weights = 0, n_terms = 0;
  for (const int64_t i : call.which) {
    run.ops.emplace_back(call.network, call.tensors, call.saved, i);
    weights += call.tensors[call.network.rows[i].weight_slot].size;
    n_terms += call.network.rows[i].groups * run.ops.back().spectrum.taps();
  }
  plan(run);
  Buffer<float> scratch(place(run, nullptr, nullptr));
  Buffer<Complex> terms(n_terms);
  place(run, scratch.data(), terms.data());
  // The longest tiles first, so that threads end together.
  std::vector<int64_t> order(run.tiles.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  const auto cost = [&](int64_t i) {
    const SymbolTile& tile = run.tiles[i];
    return (tile.end - tile.begin) * run.ops[run.parts[tile.part].op].columns;
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return cost(a) > cost(b); });
  const int64_t threads = choose_threads(call.threads, weights, kWeightsPerThread);
  const auto n_parts = static_cast<int64_t>(run.parts.size());
  parallel_for(n_parts, threads, [&](int64_t i) { prepare(run, run.parts[i]); });
  parallel_for(static_cast<int64_t>(order.size()), threads,
               [&](int64_t i) { pass(run, run.tiles[order[i]]); });
  parallel_for(n_parts, threads, [&](int64_t i) {
    norms(run, run.parts[i]);
    if (call.new_state) advance(run, run.parts[i]);
  });
  parallel_for(static_cast<int64_t>(run.ops.size()), threads,
               [&](int64_t i) { record(run, run.ops[i]); });
}

}  // namespace lmtfast::cpu
