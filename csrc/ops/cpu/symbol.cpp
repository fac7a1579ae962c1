// SPDX-License-Identifier: MIT
// The symbol engine's step on the CPU: z per group, one pass over the weights in tiles of rows,
// then frequencies and vectors per group, then the winner per operator. Vectors of all candidates
// lie together, as the columns (candidate, re or im) of a panel.
#include "ops/cpu/symbol.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <numbers>
#include <vector>

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
constexpr int64_t kTileWeights = 1 << 22;
constexpr int64_t kLeastTileRows = 64;
// Work that pays for waking a thread, and what a group takes besides its weights.
constexpr int64_t kWeightsPerThread = 1 << 14;
constexpr int64_t kWeightsPerGroup = 1 << 13;

void norms(const SymbolRun& run, SymbolPart& part) {
  double squares[kCandidates] = {}, y[kPanelColumns];
  for (int64_t r = 0; r < run.ops[part.op].row->rows; ++r) {
    image(run, part, r, y);
    for (int k = 0; k < kPanelColumns; ++k) squares[k / 2] += y[k] * y[k];
  }
  for (int f = 0; f < kCandidates; ++f) part.values[f] = std::sqrt(squares[f]);
}

// Adds up the tiles of a part in the first one's sums, in order.
void reduce(SymbolRun& run, const SymbolPart& part) {
  SymbolTile& total = run.tiles[part.first_tile];
  int top[kCandidates];
  for (int f = 0; f < kCandidates; ++f) {
    top[f] = kUnset;
    for (int64_t i = part.first_tile; i < part.end_tile; ++i) {
      top[f] = std::max(top[f], run.tiles[i].exponent[f]);
    }
    if (top[f] == kUnset) top[f] = 0;
  }
  for (int64_t i = part.first_tile; i < part.end_tile; ++i) {
    const SymbolTile& tile = run.tiles[i];
    float factors[kCandidates];
    for (int f = 0; f < kCandidates; ++f) {
      // Without a power of two the sums are zero, or not finite.
      const int down = tile.exponent[f] == kUnset ? 0 : tile.exponent[f] - top[f];
      factors[f] = static_cast<float>(std::ldexp(1.0, down));
    }
    if (part.end_tile - part.first_tile > 1) {
      panel_kernels(best_isa())
          .add(tile.sums, run.ops[part.op].blocks, factors, &tile == &total, total.sums);
    }
  }
  std::copy_n(top, kCandidates, total.exponent);
}

// The identity's share of A(w)^H u at a channel, over the power of two of the sums.
struct Centre {
  double re, im;

  Centre(const SymbolRun& run, const SymbolPart& part, int64_t channel, int f) : re(0.0), im(0.0) {
    const SymbolOperator& op = run.ops[part.op];
    if (!part.centre || channel >= op.row->rows) return;
    double y[kPanelColumns];
    image(run, part, channel, y);
    const double share = std::ldexp(op.row->identity, -run.tiles[part.first_tile].exponent[f]);
    re = share * y[2 * f];
    im = share * y[2 * f + 1];
  }
};

// response_t = <u, W_t x>, the coefficients of the trigonometric polynomial in w.
void respond(const SymbolRun& run, const SymbolPart& part, Complex* response) {
  const SymbolOperator& op = run.ops[part.op];
  Buffer<float> products(op.period * kPanelBlock);
  panel_kernels(best_isa())
      .correlate(run.tiles[part.first_tile].sums, part.panel, op.blocks, op.period,
                 products.data());
  op.sum_taps(products.data(), response);
  for (int64_t t = 0; t < op.spectrum.taps(); ++t) {
    // The panel's x has been turned by exp(-i w . offset).
    for (int f = 0; f < kCandidates; ++f) {
      const double re = response[t].re[f], im = response[t].im[f];
      response[t].re[f] = re * part.terms[t].re[f] + im * part.terms[t].im[f];
      response[t].im[f] = im * part.terms[t].re[f] - re * part.terms[t].im[f];
    }
  }
  if (!part.centre) return;
  for (int64_t c = 0; c < op.row->channels; ++c) {
    for (int f = 0; f < kCandidates; ++f) {
      const float* x =
          part.x + 2 * (f * op.width + op.spectrum.phase(op.centre) * op.row->channels + c);
      const Centre share(run, part, c, f);
      response[op.centre].re[f] += share.re * x[0] + share.im * x[1];
      response[op.centre].im[f] += share.re * x[1] - share.im * x[0];
    }
  }
}

// A(w)^H u of all candidates at x[f] (P C, 2), over the power of two of the sums, which it turns.
void gather(SymbolRun& run, const SymbolPart& part, const Complex* terms, float* const* x) {
  const SymbolOperator& op = run.ops[part.op];
  const int64_t channels = op.row->channels;
  float* sums = run.tiles[part.first_tile].sums;
  Buffer<float> line(op.blocks * kBlock), turns(op.period * kPanelBlock);
  op.repeat_terms(terms, turns.data());
  panel_kernels(best_isa()).rotate(turns.data(), op.period, true, op.blocks, sums);
  for (int k = 0; k < kPanelColumns; ++k) {
    read_column(sums, op.blocks, k, line.data());
    op.collect(line.data(), op.column_scale_of(part.group), x[k / 2] + k % 2);
  }
  const Complex& e = terms[op.centre];
  for (int64_t c = 0; c < channels && part.centre; ++c) {
    for (int f = 0; f < kCandidates; ++f) {
      const Centre share(run, part, c, f);
      float* out = x[f] + 2 * (op.spectrum.phase(op.centre) * channels + c);
      out[0] += static_cast<float>(e.re[f] * share.re + e.im[f] * share.im);
      out[1] += static_cast<float>(e.re[f] * share.im - e.im[f] * share.re);
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
  const int64_t axes = op.row->axes;
  reduce(run, part);
  std::vector<Complex> work(static_cast<size_t>(op.spectrum.taps()));
  respond(run, part, work.data());
  Frequencies w;
  std::copy_n(&part.w[0][0], axes * kCandidates, &w[0][0]);
  op.spectrum.improve(work.data(), w);
  op.spectrum.terms(w, work.data());
  float* x[kCandidates];
  for (int f = 0; f < kCandidates; ++f) {
    x[f] = run.call.new_state + op.slot(part.group, f) + 2 * axes;
  }
  gather(run, part, work.data(), x);
  double reached[kCandidates];
  for (int f = 0; f < kCandidates; ++f) {
    reached[f] =
        std::ldexp(unit_length(x[f], 2 * op.width), run.tiles[part.first_tile].exponent[f]);
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
    for (int part = 0; part < 2; ++part) {
      const int k = 2 * winner + part;
      const double y = image_entry(run, *best, r, k);
      saved.u[2 * r + part] = static_cast<float>(y / (sigma == 0.0 ? 1.0 : sigma));
      saved.p[2 * r + part] = best->images[r * kPanelColumns + k];
    }
  }
  float* z = saved.z;
  for (int64_t c = 0; c < op.row->channels; ++c) {
    for (int64_t t = 0; t < op.spectrum.taps(); ++t, z += 2) {
      const float* x =
          best->x + 2 * (winner * op.width + op.spectrum.phase(t) * op.row->channels + c);
      const float er = static_cast<float>(best->terms[t].re[winner]);
      const float ei = static_cast<float>(best->terms[t].im[winner]);
      z[0] = er * x[0] - ei * x[1];
      z[1] = er * x[1] + ei * x[0];
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

// Hands out an operator's scratch, or, from null, counts the floats it takes.
int64_t place(SymbolRun& run, const SymbolOperator& op, float* scratch) {
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    float* at = scratch ? scratch + used : nullptr;
    used += blocks_of(n) * kBlock;
    return at;
  };
  for (int64_t g = 0; g < op.row->groups; ++g) {
    SymbolPart& part = run.parts[op.first_part + g];
    part.x = take(kCandidates * 2 * op.width);
    part.panel = take(op.blocks * kPanelBlock);
    part.images = take(op.row->rows * kPanelColumns);
    if (op.row->identity != 0.0) part.centre = take(op.row->rows * kPanelColumns);
    for (int64_t i = part.first_tile; i < part.end_tile && run.call.new_state; ++i) {
      run.tiles[i].sums = take(op.blocks * kPanelBlock);
    }
  }
  return used;
}

// Scratch of the operators that are under way. The next one gets that of one that has ended, which
// is still in the cache: panels for the whole network would be written to memory and read again.
class ScratchPool {
 public:
  explicit ScratchPool(int64_t size) : size_(size) {}

  float* take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) {
      all_.push_back(std::make_unique<Buffer<float>>(size_));
      return all_.back()->data();
    }
    float* scratch = free_.back();
    free_.pop_back();
    return scratch;
  }
  void give_back(float* scratch) {
    const std::lock_guard lock(mutex_);
    free_.push_back(scratch);
  }

 private:
  int64_t size_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Buffer<float>>> all_;
  std::vector<float*> free_;
};

// What the threads that share an operator agree on.
struct Progress {
  std::once_flag begun;
  float* scratch = nullptr;
  std::atomic<int64_t> advanced = 0;
};

}  // namespace

void symbol_step(const SpectralStep& call) {
  SymbolRun run{call, {}, {}, {}};
  int64_t weights = 0, n_terms = 0, largest = 0;
  for (const int64_t i : call.which) {
    run.ops.emplace_back(call.network, call.tensors, call.saved, i);
    weights += call.tensors[call.network.rows[i].weight_slot].size;
    n_terms += call.network.rows[i].groups * run.ops.back().spectrum.taps();
  }
  plan(run);
  for (const SymbolOperator& op : run.ops) largest = std::max(largest, place(run, op, nullptr));
  ScratchPool pool(largest);
  Buffer<Complex> terms(n_terms);
  Complex* next_terms = terms.data();
  for (SymbolPart& part : run.parts) {
    part.terms = next_terms;
    next_terms += run.ops[part.op].spectrum.taps();
  }
  // Operators with the longest tiles first, so that threads end together.
  std::vector<const SymbolOperator*> sorted;
  for (const SymbolOperator& op : run.ops) sorted.push_back(&op);
  const auto length = [&](const SymbolOperator* op) {
    const SymbolTile& tile = run.tiles[run.parts[op->first_part].first_tile];
    return (tile.end - tile.begin) * op->columns;
  };
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](const auto* a, const auto* b) { return length(a) > length(b); });
  std::vector<int64_t> order;
  for (const SymbolOperator* op : sorted) {
    const SymbolPart *first = &run.parts[op->first_part], *last = first + op->row->groups - 1;
    for (int64_t i = first->first_tile; i < last->end_tile; ++i) order.push_back(i);
  }
  // Whoever begins a group's first tile prepares the group; whoever ends its last one goes on with
  // it while its sums are in the cache.
  std::vector<Progress> progress(run.ops.size());
  std::vector<std::once_flag> prepared(run.parts.size());
  std::vector<std::atomic<int64_t>> passed(run.parts.size());
  const int64_t work = weights + kWeightsPerGroup * static_cast<int64_t>(run.parts.size());
  const int64_t threads = choose_threads(call.threads, work, kWeightsPerThread);
  parallel_for(static_cast<int64_t>(order.size()), threads, [&](int64_t i) {
    SymbolTile& tile = run.tiles[order[i]];
    SymbolPart& part = run.parts[tile.part];
    const SymbolOperator& op = run.ops[part.op];
    Progress& its = progress[part.op];
    std::call_once(its.begun, [&] { place(run, op, its.scratch = pool.take()); });
    std::call_once(prepared[tile.part], [&] { prepare(run, part); });
    pass(run, tile);
    if (++passed[tile.part] < part.end_tile - part.first_tile) return;
    norms(run, part);
    if (call.new_state) advance(run, part);
    if (++its.advanced < op.row->groups) return;
    record(run, op);
    pool.give_back(its.scratch);
  });
}

}  // namespace lmtfast::cpu
