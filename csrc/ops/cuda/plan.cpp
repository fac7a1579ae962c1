// SPDX-License-Identifier: MIT
#include "ops/cuda/plan.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "ops/cuda/circles.h"
#include "ops/cuda/frequency.h"

namespace lmtfast::cuda {
namespace {

constexpr int64_t kMaxIndex = int64_t{1} << 31;
// Cost of a pass, in weights: of four rows beyond their weights, and of a tile. One tile per
// multiprocessor covers a WRN-28-10 on 132 of them; smaller ones would write more sums.
constexpr int64_t kStepCost = 1024;
constexpr int64_t kTileCost = 336 * 1024;

int64_t pieces(int64_t length, int64_t piece) { return (length + piece - 1) / piece; }

void need(bool ok, const char* expected, int64_t got, const char* field, int64_t index) {
  if (!ok) throw_invalid(expected, got, std::string(field) + "[" + std::to_string(index) + "]");
}

// Kernels index one operator in 32 bits.
void require_indexable(const OpRow& row, int64_t i) {
  const double rows = static_cast<double>(row.groups) * static_cast<double>(row.rows);
  const double channels = static_cast<double>(row.groups) * static_cast<double>(row.channels);
  const double taps = static_cast<double>(volume_of(row.kernel));
  const double limit = static_cast<double>(kMaxIndex) / kPanel;
  need(rows * taps < limit && channels * taps < limit, "fewer than 2^28 rows and columns", row.rows,
       "rows.rows", i);
  need(static_cast<double>(volume_of(row.in)) * kPanel < limit &&
           static_cast<double>(volume_of(row.out)) * kPanel < limit,
       "fewer than 2^25 positions", volume_of(row.in), "rows.in", i);
  need(row.axes > 0 || row.transposed == 0, "a matrix that is not transposed", row.transposed,
       "rows.transposed", i);
  int64_t reach = 0;
  for (int a = 0; a < kAxes; ++a) {
    reach = std::max(reach, row.stride[a] * row.out[a] + row.dilation[a] * row.kernel[a] +
                                2 * row.in[a] + row.pad_low[a] + row.pad_high[a]);
  }
  need(reach < kMaxIndex, "coordinates below 2^31", reach, "rows.out", i);
}

class Builder {
 public:
  Builder(const lmtfast_network& net, int64_t shared_bytes)
      : net_(net), shared_floats_((shared_bytes - kOtherShared) / 4), work_(net.n_rows) {
    std::memset(static_cast<void*>(work_.data()), 0, work_.size() * sizeof(OpWork));
  }

  std::vector<int64_t> build();

 private:
  int64_t floats(int64_t count) { return take(header_.floats, pieces(count, 4) * 4); }
  int64_t doubles(int64_t count) { return take(header_.doubles, count); }
  static int64_t take(int64_t& end, int64_t count) {
    const int64_t begin = end;
    end += count;
    return begin;
  }
  void add(Stage stage, int64_t op, int64_t group, int64_t tiles) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      items_[stage].push_back({static_cast<int32_t>(op), static_cast<int32_t>(group),
                               static_cast<int32_t>(tile), static_cast<int32_t>(tiles)});
    }
  }
  void plan_row(int64_t i);
  PassShape pass_shape(const Stencil& s, bool symbol) const;
  int64_t pass_cost(const Item& item) const;
  void plan_pass(int64_t i, const Stencil& s);
  void plan_separable(int64_t i, const Stencil& s);
  void plan_stencil(int64_t i, const Stencil& s);
  void plan_scales(int64_t i);
  void plan_gradient(int64_t i, const Stencil& s);
  void plan_diagonal(int64_t i);
  std::vector<Item>& round(int64_t number);

  const lmtfast_network& net_;
  int64_t shared_floats_;
  PlanHeader header_ = {};
  std::vector<OpWork> work_;
  std::vector<Item> items_[kStages];
  std::vector<std::vector<Item>> rounds_;
};

void Builder::plan_scales(int64_t i) {
  const OpRow& row = net_.rows[i];
  OpWork& work = work_[i];
  const auto covers = [&](const lmtfast_scale_row& scale, int64_t offset, int64_t length) {
    return offset >= 0 && scale.offset < offset + length && offset < scale.offset + scale.length;
  };
  work.scale_begin = net_.n_scales;
  for (int64_t k = 0; k < net_.n_scales; ++k) {
    if (!covers(net_.scales[k], row.row_scale, row.groups * row.rows) &&
        !covers(net_.scales[k], row.column_scale, row.groups * row.channels)) {
      continue;
    }
    work.scale_begin = std::min(work.scale_begin, k);
    work.scale_end = k + 1;
  }
  // Blocks of different operators would write one entry.
  for (int64_t other = 0; other < i; ++other) {
    const OpRow& o = net_.rows[other];
    const auto apart = [](int64_t a, int64_t n, int64_t b, int64_t m) {
      return a < 0 || b < 0 || a + n <= b || b + m <= a;
    };
    need(o.kind == 0 ||
             (apart(row.row_scale, row.groups * row.rows, o.row_scale, o.groups * o.rows) &&
              apart(row.column_scale, row.groups * row.channels, o.row_scale, o.groups * o.rows) &&
              apart(row.row_scale, row.groups * row.rows, o.column_scale, o.groups * o.channels) &&
              apart(row.column_scale, row.groups * row.channels, o.column_scale,
                    o.groups * o.channels)),
         "scales of its own", row.row_scale, "rows.row_scale", i);
  }
}

int64_t Builder::pass_cost(const Item& item) const {
  const OpWork& work = work_[item.op];
  if (static_cast<Method>(work.method) == Method::kSeparable) return INT64_MAX;
  return work.pass.rows * (work.stencil.columns + kStepCost / kPassRows);
}

// The tiles of an operator depend on nothing but the operator, and so do its results.
PassShape Builder::pass_shape(const Stencil& s, bool symbol) const {
  PassShape shape = {};
  const int64_t columns = s.columns, entries = static_cast<int64_t>(s.phases) * s.channels;
  const int64_t steps = std::max<int64_t>(1, kTileCost / (columns * kPassRows + kStepCost));
  const int64_t tiles = pieces(s.rows, steps * kPassRows);
  shape.rows = pieces(pieces(s.rows, tiles), kPassRows) * kPassRows;
  shape.tiles = pieces(s.rows, shape.rows);
  shape.padded = pieces(columns, 8) * 8;
  const auto fits = [&](int64_t width) {
    shape.columns = width;
    shape.vector = vector_floats(entries, s.taps, width);
    return shape.vector + shape.padded * width <= shared_floats_;
  };
  const int64_t all = symbol ? kPassColumns : 2;
  shape.shared_sums = fits(all) || fits(2);
  // Not one candidate fits: sums go to memory, then for all of them at once.
  if (!shape.shared_sums) static_cast<void>(fits(all));
  shape.shared_vector = shape.vector <= shared_floats_;
  shape.subsets = all / shape.columns;
  return shape;
}

void Builder::plan_pass(int64_t i, const Stencil& s) {
  const OpRow& row = net_.rows[i];
  OpWork& work = work_[i];
  const int64_t g = s.groups;
  const bool symbol = method_of(row) == Method::kSymbol;
  work.pass = pass_shape(s, symbol);
  const PassShape& shape = work.pass;
  const int64_t items = shape.tiles * shape.subsets;
  header_.pass_bytes =
      std::max(header_.pass_bytes, 4 * ((shape.shared_vector ? shape.vector : 0) +
                                        (shape.shared_sums ? shape.padded * shape.columns : 0)));
  work.back = floats(g * s.columns * kPassColumns);
  work.panel = floats(g * shape.subsets * shape.vector);
  work.pure = floats(g * s.rows * kPassColumns);
  work.image = floats(g * s.rows * kPassColumns);
  work.partial = floats(g * items * shape.padded * shape.columns);
  work.norms = doubles(g * shape.tiles * kPassColumns);
  work.powers = doubles(g * items);
  work.counters = take(header_.counters, g);
  const int64_t width = static_cast<int64_t>(LMTFAST_CANDIDATES) * s.phases * s.channels * 2;
  work.plain = floats(symbol ? g * width : s.channels);
  if (symbol) {
    work.fresh = floats(g * width);
    work.phase = floats(g * s.taps * kPassColumns);
    const Grid grid = grid_of(s);
    std::copy(grid.size, grid.size + kAxes, work.frequencies);
    work.frequency = doubles(g * LMTFAST_CANDIDATES * kAxes);
    work.response = doubles(g * s.taps * kPassColumns);
  }
  for (int64_t group = 0; group < g; ++group) {
    add(kPrepare, i, group, 1);
    add(kPass, i, group, items);
    add(kFinish, i, group, pieces(s.columns, kSumColumns));
  }
  add(kRecord, i, 0, 1);
}

void Builder::plan_separable(int64_t i, const Stencil& s) {
  OpWork& work = work_[i];
  const int64_t g = s.groups, pairs = static_cast<int64_t>(s.taps) * kPanel;
  work.image_tiles = pieces(s.rows, kImageRows);
  work.back_tiles = pieces(s.columns, kBackColumns);
  work.back = floats(g * s.columns * kPanel);
  work.panel = floats(g * s.channels * kPanel);
  work.plain = floats(g * s.channels * kPanel);
  work.image = floats(g * s.rows * pairs);
  work.mixed = floats(g * s.rows * pairs);
  work.patterns = floats(g * s.inputs * kPanel);
  work.next = floats(g * s.inputs * kPanel);
  work.grid = floats(g * s.outputs * pairs);
  work.gram = floats(g * pairs * pairs);
  work.overlap = floats(g * pairs * pairs);
  work.saved_overlap = floats(pairs * pairs);
  work.saved_mixed = floats(s.rows * pairs);
  work.values = doubles(2 * g);
  work.counters = take(header_.counters, 2 * g);
  for (int64_t group = 0; group < g; ++group) {
    add(kPrepare, i, group, 1);
    add(kPass, i, group, work.image_tiles);
    add(kFinish, i, group, work.back_tiles);
  }
  add(kRecord, i, 0, 1);
  header_.finish_bytes = kTileBytes;
  header_.pass_bytes = std::max(header_.pass_bytes, kTileBytes);
}

void Builder::plan_stencil(int64_t i, const Stencil& s) {
  OpWork& work = work_[i];
  const int64_t outside = static_cast<int64_t>(s.rows) * s.outputs;
  const int64_t inside = static_cast<int64_t>(s.channels) * s.inputs;
  const int64_t image = pieces(s.rows, kTileSide) * pieces(s.outputs, kTileSide);
  const int64_t adjoint = pieces(s.channels, kTileSide) * pieces(s.inputs, kTileSide);
  work.image_tiles = s.transposed ? adjoint : image;
  work.back_tiles = s.transposed ? image : adjoint;
  work.inputs = pieces(s.groups * (s.transposed ? outside : inside), kVectorEntries);
  work.images = s.groups * work.image_tiles;
  work.backs = s.groups * work.back_tiles;
  work.input_sums = doubles(work.inputs);
  work.image_sums = doubles(work.images);
  work.back_sums = doubles(work.backs);
  work.image = floats(s.groups * (s.transposed ? inside : outside));
  work.back = floats(s.groups * (s.transposed ? outside : inside));
  work.counters = take(header_.counters, 1);
  add(kPrepare, i, 0, work.inputs);
  if (work.scale_begin < work.scale_end || net_.rows[i].row_scale >= 0 ||
      net_.rows[i].column_scale >= 0) {
    const auto tiles = static_cast<int32_t>(work.inputs);
    items_[kPrepare].push_back({static_cast<int32_t>(i), 0, tiles, tiles});
  }
  for (int64_t group = 0; group < s.groups; ++group) {
    add(s.transposed ? kFirstAdjoint : kFirstImage, i, group, work.image_tiles);
    add(s.transposed ? kSecondImage : kSecondAdjoint, i, group, work.back_tiles);
  }
}

// Whether two operators write the gradient of their weight in the same blocks.
bool same_gradient(const OpRow& a, const OpRow& b) {
  return a.weight_slot == b.weight_slot && a.groups == b.groups && a.rows == b.rows &&
         a.channels == b.channels && volume_of(a.kernel) == volume_of(b.kernel) &&
         gradient_in_strips(a) == gradient_in_strips(b);
}

void Builder::plan_gradient(int64_t i, const Stencil& s) {
  OpWork& work = work_[i];
  const OpRow& row = net_.rows[i];
  const int64_t row_tiles = pieces(s.rows, kTileSide), column_tiles = pieces(s.columns, kTileSide);
  work.tied = work.circle = -1;
  if (row.row_scale >= 0) work.row_sums = floats(s.groups * column_tiles * s.rows);
  if (row.column_scale >= 0) work.column_sums = floats(s.groups * row_tiles * s.columns);
  int64_t heads_before = 0;
  for (int64_t other = 0; other < i; ++other) {
    const OpRow& o = net_.rows[other];
    if (o.kind != LMTFAST_STENCIL || o.weight_slot != row.weight_slot) continue;
    if (same_gradient(o, row) && work_[other].tied < 0) {
      work_[other].tied = i;
      return;
    }
    bool heads = true;
    for (int64_t before = 0; before < other; ++before) heads = heads && work_[before].tied != other;
    heads_before += heads;
  }
  work.accumulate = heads_before > 0;
  const int64_t across = gradient_in_strips(row) ? pieces(s.columns, kStripColumns) : column_tiles;
  for (int64_t group = 0; group < s.groups; ++group) {
    add(kGradient, i, group, row_tiles * across);
    for (auto& item : items_[kGradient]) round(heads_before).push_back(item);
    items_[kGradient].clear();
  }
}

std::vector<Item>& Builder::round(int64_t number) {
  if (static_cast<int64_t>(rounds_.size()) <= number) rounds_.resize(number + 1);
  return rounds_[number];
}

void Builder::plan_diagonal(int64_t i) {
  const OpRow& row = net_.rows[i];
  need(row.groups == 1, "one group", row.groups, "rows.groups", i);
  need(row.rows < kMaxIndex, "fewer than 2^31 entries", row.rows, "rows.rows", i);
  plan_scales(i);
  work_[i].method = static_cast<int64_t>(method_of(row));
  work_[i].tied = work_[i].circle = -1;
  add(kPrepare, i, 0, 1);
  round(0).push_back({static_cast<int32_t>(i), 0, 0, 1});
}

void Builder::plan_row(int64_t i) {
  const OpRow& row = net_.rows[i];
  if (row.kind == LMTFAST_DIAGONAL) return plan_diagonal(i);
  require_indexable(row, i);
  const Stencil s = stencil_of(row);
  work_[i].stencil = s;
  work_[i].method = static_cast<int64_t>(method_of(row));
  header_.n_slots = std::max(header_.n_slots, row.weight_slot + 1);
  plan_scales(i);
  if (method_of(row) == Method::kStencil) {
    plan_stencil(i, s);
  } else if (method_of(row) != Method::kSeparable) {
    plan_pass(i, s);
  } else {
    plan_separable(i, s);
  }
  plan_gradient(i, s);
}

std::vector<int64_t> Builder::build() {
  items_[kPrepare].push_back({-1, 0, 0, 0});
  for (int64_t i = 0; i < net_.n_rows; ++i) {
    if (net_.rows[i].kind != 0) plan_row(i);
  }
  const Circles circles = make_circles(net_, work_, rounds_);
  items_[kGradientSums] = circles.sums;
  items_[kGradientSlots] = circles.slots;
  for (const Item& item : circles.slots) {
    header_.n_slots = std::max(header_.n_slots, int64_t{item.op} + 1);
  }
  header_.counters = std::max(header_.counters, static_cast<int64_t>(circles.circles.size()));
  require(header_.n_slots <= kMaxTensors, "at most 1800 tensors", header_.n_slots, "n_tensors");
  header_.grad_scales = floats(net_.scale_size);
  header_.magic = kPlanMagic;
  header_.n_rows = net_.n_rows;
  header_.n_scales = net_.n_scales;
  header_.n_tape = net_.n_tape;
  header_.features = net_.features;
  header_.total = net_.total;
  header_.scale_size = net_.scale_size;
  header_.saved_size = net_.saved_size;
  header_.state_size = net_.state_size;
  header_.n_rounds = static_cast<int64_t>(rounds_.size());

  std::vector<int64_t> table(sizeof(PlanHeader) / sizeof(int64_t), 0);
  const auto append = [&](const void* data, size_t bytes) {
    // Items start at multiples of their own size.
    if (table.size() % 2 != 0) table.push_back(0);
    const auto begin = static_cast<int64_t>(table.size());
    table.resize(table.size() + bytes / sizeof(int64_t));
    if (bytes != 0) std::memcpy(table.data() + begin, data, bytes);
    return begin;
  };
  header_.rows = append(net_.rows, net_.n_rows * sizeof(OpRow));
  header_.scales = append(net_.scales, net_.n_scales * sizeof(lmtfast_scale_row));
  header_.tape = append(net_.tape, net_.n_tape * sizeof(lmtfast_instruction));
  header_.work = append(work_.data(), work_.size() * sizeof(OpWork));
  // Images first, because the grid's share follows them, then long items: what is left at the end is
  // short.
  std::stable_sort(items_[kPass].begin(), items_[kPass].end(),
                   [&](const Item& a, const Item& b) { return pass_cost(a) > pass_cost(b); });
  std::vector<int64_t> begins;
  for (const auto& round : rounds_) {
    begins.push_back(static_cast<int64_t>(items_[kGradient].size()));
    items_[kGradient].insert(items_[kGradient].end(), round.begin(), round.end());
  }
  begins.push_back(static_cast<int64_t>(items_[kGradient].size()));
  header_.rounds = append(begins.data(), begins.size() * sizeof(int64_t));
  header_.circles = append(circles.circles.data(), circles.circles.size() * sizeof(Circle));
  header_.n_circles = static_cast<int64_t>(circles.circles.size());
  for (int stage = 0; stage < kStages; ++stage) {
    const auto& items = items_[stage];
    need(static_cast<int64_t>(items.size()) < kMaxIndex, "fewer than 2^31 blocks",
         static_cast<int64_t>(items.size()), "stage", stage);
    header_.stage[stage] = append(items.data(), items.size() * sizeof(Item));
    header_.blocks[stage] = static_cast<int64_t>(items.size());
  }
  header_.table_size = static_cast<int64_t>(table.size());
  std::memcpy(table.data(), &header_, sizeof(header_));
  return table;
}

}  // namespace

std::vector<int64_t> make_plan(const lmtfast_network& network, int64_t shared_bytes) {
  require(shared_bytes >= kOtherShared, "at least 4096 bytes of shared memory", shared_bytes,
          "shared_bytes");
  require(network.n_rows >= 0 && (network.n_rows == 0 || network.rows), "rows", network.n_rows,
          "n_rows");
  require(network.n_scales >= 0 && (network.n_scales == 0 || network.scales), "scales",
          network.n_scales, "n_scales");
  require(network.n_tape >= 0 && (network.n_tape == 0 || network.tape), "a tape", network.n_tape,
          "n_tape");
  if (network.n_tape > 0) validate_tape(network);
  return Builder(network, shared_bytes).build();
}

const PlanHeader& header_of(const int64_t* table) {
  require(table != nullptr, "a plan", 0, "plan");
  const auto& header = *reinterpret_cast<const PlanHeader*>(table);
  require(header.magic == kPlanMagic, "a table made by lmtfast_cuda_plan", header.magic, "plan");
  return header;
}

lmtfast_network network_of(const int64_t* table) {
  const PlanHeader& h = header_of(table);
  return {reinterpret_cast<const lmtfast_op_row*>(table + h.rows),
          reinterpret_cast<const lmtfast_scale_row*>(table + h.scales),
          reinterpret_cast<const lmtfast_instruction*>(table + h.tape),
          h.n_rows,
          h.n_scales,
          h.n_tape,
          h.features,
          h.total,
          h.scale_size,
          h.saved_size,
          h.state_size};
}

int64_t workspace_bytes(const PlanHeader& h) {
  const int64_t step = (h.n_slots + h.doubles) * 8 + (h.floats + h.counters) * 4 + 16;
  return std::max(step, compose_doubles(h) * 8);
}

int64_t compose_doubles(const PlanHeader& h) { return 3 * h.n_tape + 2 * h.n_rows; }

}  // namespace lmtfast::cuda
