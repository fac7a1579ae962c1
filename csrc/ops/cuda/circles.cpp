// SPDX-License-Identifier: MIT
#include "ops/cuda/circles.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

namespace lmtfast::cuda {
namespace {

// Whether factor k of the scale buffer belongs to operator i.
bool reads_scale(const lmtfast_network& net, int64_t i, int64_t k) {
  const OpRow& row = net.rows[i];
  const lmtfast_scale_row& scale = net.scales[k];
  const auto inside = [&](int64_t offset, int64_t length) {
    return offset >= 0 && scale.offset < offset + length && offset < scale.offset + scale.length;
  };
  return inside(row.row_scale, row.groups * row.rows) ||
         inside(row.column_scale, row.groups * row.channels);
}

// Two operators that add to one gradient, or whose scales read one tensor, are in one circle: its
// first operator, for each.
std::vector<int64_t> circle_of_each(const lmtfast_network& net, const std::vector<OpWork>& work) {
  std::vector<int64_t> root(static_cast<size_t>(net.n_rows));
  std::iota(root.begin(), root.end(), int64_t{0});
  const auto find = [&](int64_t i) {
    while (root[i] != i) i = root[i];
    return i;
  };
  std::map<int64_t, int64_t> reader;  // of a tensor of scales
  for (int64_t i = 0; i < net.n_rows; ++i) {
    if (net.rows[i].kind == 0) continue;
    if (work[i].tied >= 0) root[find(work[i].tied)] = find(i);
    for (int64_t k = work[i].scale_begin; k < work[i].scale_end; ++k) {
      if (!reads_scale(net, i, k)) continue;
      for (const int64_t slot : {net.scales[k].slot, net.scales[k].variance_slot}) {
        if (slot < 0) continue;
        const auto [it, fresh] = reader.try_emplace(slot, i);
        if (!fresh) root[find(i)] = find(it->second);
      }
    }
  }
  for (int64_t i = 0; i < net.n_rows; ++i) root[i] = find(i);
  return root;
}

// Tensor by tensor, the factors that read it in the order of the table.
void add_slots(const lmtfast_network& net, std::vector<int64_t> factors, std::vector<Item>& slots) {
  std::sort(factors.begin(), factors.end());
  factors.erase(std::unique(factors.begin(), factors.end()), factors.end());
  std::vector<std::pair<int64_t, int64_t>> reads;
  for (const int64_t k : factors) {
    for (const int64_t slot : {net.scales[k].slot, net.scales[k].variance_slot}) {
      if (slot >= 0) reads.emplace_back(slot, k);
    }
  }
  std::sort(reads.begin(), reads.end());
  reads.erase(std::unique(reads.begin(), reads.end()), reads.end());
  for (const auto& [slot, k] : reads) {
    int64_t begin = k, end = k + 1;
    for (const int64_t other : factors) {
      if (net.scales[other].offset != net.scales[k].offset) continue;
      begin = std::min(begin, other);
      end = std::max(end, other + 1);
    }
    slots.push_back({static_cast<int32_t>(slot), static_cast<int32_t>(k),
                     static_cast<int32_t>(begin), static_cast<int32_t>(end)});
  }
}

}  // namespace

Circles make_circles(const lmtfast_network& net, std::vector<OpWork>& work,
                     const std::vector<std::vector<Item>>& rounds) {
  Circles result;
  const std::vector<int64_t> root = circle_of_each(net, work);
  for (int64_t first = 0; first < net.n_rows; ++first) {
    if (net.rows[first].kind == 0 || work[first].circle >= 0) continue;
    std::vector<int64_t> members, factors;
    for (int64_t i = first; i < net.n_rows; ++i) {
      if (net.rows[i].kind != 0 && root[i] == root[first]) members.push_back(i);
    }
    Circle circle = {};
    circle.sums_begin = static_cast<int64_t>(result.sums.size());
    for (const int64_t i : members) {
      const OpRow& row = net.rows[i];
      if (row.row_scale < 0 && row.column_scale < 0) continue;
      for (int64_t group = 0; group < row.groups; ++group) {
        result.sums.push_back({static_cast<int32_t>(i), static_cast<int32_t>(group), 0, 1});
      }
      for (int64_t k = work[i].scale_begin; k < work[i].scale_end; ++k) {
        if (reads_scale(net, i, k)) factors.push_back(k);
      }
    }
    circle.sums_end = static_cast<int64_t>(result.sums.size());
    if (circle.sums_end == circle.sums_begin) continue;
    circle.slots_begin = static_cast<int64_t>(result.slots.size());
    add_slots(net, factors, result.slots);
    circle.slots_end = static_cast<int64_t>(result.slots.size());
    for (const int64_t i : members) work[i].circle = static_cast<int64_t>(result.circles.size());
    result.circles.push_back(circle);
  }
  for (const auto& round : rounds) {
    for (const Item& item : round) {
      if (work[item.op].circle >= 0) ++result.circles[work[item.op].circle].blocks;
    }
  }
  return result;
}

}  // namespace lmtfast::cuda
