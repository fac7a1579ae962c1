// SPDX-License-Identifier: MIT
// The spectral step, its gradient and the tape through the C ABI, emulated: no access outside a
// buffer, every output written, the same bits in every order of blocks and threads. What the numbers
// are is tested against the reference in Python.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "cuda_emulation.h"
#include "fence.h"
#include "ops/spectral.h"

namespace {

struct Shape {
  const char* name;
  int64_t engine, groups, rows, channels;
  std::vector<int64_t> in, kernel, stride, pad, dilation;
  bool transposed = false, circular = false, tap_major = false, bfloat16 = false, scaled = false;
  double identity = 0;
};

// A network whose operators are the given ones, each with a weight of its own.
class Network {
 public:
  explicit Network(const std::vector<Shape>& shapes, bool at_end) : at_end_(at_end) {
    for (const Shape& shape : shapes) add(shape);
    for (auto& row : rows_) row.saved_offset += scale_size_;
    saved_size_ += scale_size_;
    view_ = {rows_.data(),
             scales_.data(),
             tape_.data(),
             static_cast<int64_t>(rows_.size()),
             static_cast<int64_t>(scales_.size()),
             static_cast<int64_t>(tape_.size()),
             0,
             static_cast<int64_t>(tape_.size()) - 1,
             scale_size_,
             saved_size_,
             state_size_};
  }

  const lmtfast_network& view() const { return view_; }
  const std::vector<lmtfast_tensor>& tensors() const { return tensors_; }
  int64_t state_size() const { return state_size_; }
  int64_t saved_size() const { return saved_size_; }
  int64_t size() const { return static_cast<int64_t>(rows_.size()); }

 private:
  void add(const Shape& shape);
  int64_t add_tensor(int64_t size, bool bfloat16, bool tap_major, bool positive);

  bool at_end_;
  std::mt19937_64 random_{7};
  std::vector<lmtfast_op_row> rows_;
  std::vector<lmtfast_scale_row> scales_;
  std::vector<lmtfast_instruction> tape_;
  std::vector<lmtfast_tensor> tensors_;
  std::vector<std::unique_ptr<Fenced<uint16_t>>> halves_;
  std::vector<std::unique_ptr<Fenced<float>>> floats_;
  int64_t state_size_ = 0, saved_size_ = 0, scale_size_ = 0;
  lmtfast_network view_;
};

int64_t Network::add_tensor(int64_t size, bool bfloat16, bool tap_major, bool positive) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(size));
  for (auto& v : values) v = positive ? 0.5f + std::fabs(normal(random_)) : normal(random_);
  void* data;
  if (bfloat16) {
    std::vector<uint16_t> bits;
    for (const float v : values) {
      uint32_t word;
      std::memcpy(&word, &v, sizeof(word));
      bits.push_back(static_cast<uint16_t>(word >> 16));
    }
    halves_.push_back(std::make_unique<Fenced<uint16_t>>(bits, at_end_));
    data = halves_.back()->data();
  } else {
    floats_.push_back(std::make_unique<Fenced<float>>(values, at_end_));
    data = floats_.back()->data();
  }
  tensors_.push_back({data, bfloat16 ? LMTFAST_BFLOAT16 : LMTFAST_FLOAT32, size, tap_major});
  return static_cast<int64_t>(tensors_.size()) - 1;
}

void Network::add(const Shape& shape) {
  lmtfast_op_row row = {};
  row.kind = 1;
  row.engine = shape.engine;
  row.axes = static_cast<int64_t>(shape.in.size());
  row.groups = shape.groups;
  row.rows = shape.rows;
  row.channels = shape.channels;
  row.transposed = shape.transposed;
  row.circular = shape.circular;
  row.identity = shape.identity;
  for (int64_t a = 0; a < LMTFAST_OP_ROW_AXES; ++a) {
    const int64_t i = a - (LMTFAST_OP_ROW_AXES - row.axes);
    row.in[a] = i < 0 ? 1 : shape.in[i];
    row.kernel[a] = i < 0 ? 1 : shape.kernel[i];
    row.stride[a] = i < 0 ? 1 : shape.stride[i];
    row.dilation[a] = i < 0 ? 1 : shape.dilation[i];
    row.pad_low[a] = row.pad_high[a] = i < 0 ? 0 : shape.pad[i];
    row.out[a] = (row.in[a] + 2 * row.pad_low[a] - row.dilation[a] * (row.kernel[a] - 1) - 1) /
                     row.stride[a] +
                 1;
  }
  row.rank = std::min({int64_t{LMTFAST_RANK}, row.channels, lmtfast::volume(row.in)});
  const int64_t size = row.groups * row.rows * lmtfast::columns(row);
  row.weight_slot = add_tensor(size, shape.bfloat16, shape.tap_major, false);
  row.row_scale = row.column_scale = -1;
  if (shape.scaled) {
    const int64_t outs = row.groups * row.rows, ins = row.groups * row.channels;
    row.row_scale = scale_size_;
    const int64_t gamma = add_tensor(outs, false, false, false);
    const int64_t variance = add_tensor(outs, false, false, true);
    const int64_t alpha = add_tensor(1, false, false, true);
    scales_.push_back({scale_size_, outs, gamma, variance, 0, 1e-3, 1.0});
    scales_.push_back({scale_size_, outs, alpha, -1, 1, 0.0, -0.5});
    scale_size_ += outs;
    row.column_scale = scale_size_;
    scales_.push_back({scale_size_, ins, add_tensor(ins, false, false, false), -1, 0, 0.0, 1.0});
    scale_size_ += ins;
  }
  row.state_offset = state_size_;
  row.saved_offset = saved_size_;
  state_size_ += lmtfast::state_entries(row);
  saved_size_ += lmtfast::saved_entries(row);
  const auto index = static_cast<int64_t>(rows_.size());
  rows_.push_back(row);
  tape_.push_back({LMTFAST_SIGMA, index, 0, 0.0});
  const auto last = static_cast<int64_t>(tape_.size()) - 1;
  if (last > 0) tape_.push_back({LMTFAST_HYPOT, last - 1, last, 0.0});
}

// What the plan may use of shared memory: that of sm_90, unless a test gives less.
int64_t shared_bytes = 227 << 10;

struct Outputs {
  std::vector<float> sigmas, state, saved, gradients, values, jacobian;
  bool operator==(const Outputs& o) const {
    const auto same = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(sigmas, o.sigmas) && same(state, o.state) && same(saved, o.saved) &&
           same(gradients, o.gradients) && same(values, o.values) && same(jacobian, o.jacobian);
  }
};

void require_ok(lmtfast_status status, const char* what) {
  if (status != LMTFAST_OK) std::printf("%s: %s\n", what, lmtfast_last_error());
  CHECK(status == LMTFAST_OK);
}

bool written(const Fenced<float>& buffer) {
  for (size_t i = 0; i < buffer.size(); ++i) {
    if (!std::isfinite(buffer[i])) return false;
  }
  return buffer.tail_intact();
}

Outputs run(const Network& net, bool at_end, bool update, uint64_t seed) {
  lmtfast::emulation::set_order(seed);
  int64_t size = 0, bytes = 0;
  require_ok(lmtfast_cuda_plan(&net.view(), shared_bytes, nullptr, 0, &size, &bytes), "plan");
  std::vector<int64_t> host(static_cast<size_t>(size));
  require_ok(lmtfast_cuda_plan(&net.view(), shared_bytes, host.data(), size, &size, &bytes),
             "plan");
  const Fenced<int64_t> device(host, at_end);
  const Fenced<unsigned char> workspace(static_cast<size_t>(bytes), at_end);

  std::mt19937_64 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> start(static_cast<size_t>(net.state_size()));
  for (auto& x : start) x = normal(random);
  const Fenced<float> state(start, at_end), sigmas(static_cast<size_t>(net.size()), at_end);
  const Fenced<float> next(static_cast<size_t>(net.state_size()), at_end);
  const Fenced<float> saved(static_cast<size_t>(net.saved_size()), at_end);
  const auto n = static_cast<int64_t>(net.tensors().size());
  require_ok(lmtfast_cuda_spectral_step(host.data(), device.data(), net.tensors().data(), n,
                                        state.data(), update ? next.data() : nullptr, sigmas.data(),
                                        saved.data(), workspace.data(), nullptr),
             "step");
  CHECK(written(sigmas));
  CHECK(written(saved));
  CHECK(!update || written(next));
  CHECK(state.values() == start);

  std::vector<std::unique_ptr<Fenced<float>>> gradients;
  std::vector<lmtfast_tensor> grads;
  for (const lmtfast_tensor& t : net.tensors()) {
    gradients.push_back(std::make_unique<Fenced<float>>(static_cast<size_t>(t.size), at_end));
    grads.push_back({gradients.back()->data(), LMTFAST_FLOAT32, t.size, t.tap_major});
  }
  const Fenced<float> grad(std::vector<float>(static_cast<size_t>(net.size()), 0.5f), at_end);
  const Fenced<unsigned char> other(static_cast<size_t>(bytes), at_end);
  require_ok(
      lmtfast_cuda_spectral_vjp(host.data(), device.data(), net.tensors().data(), n, saved.data(),
                                grad.data(), grads.data(), other.data(), nullptr),
      "vjp");
  const Fenced<float> values(2, at_end), jacobian(static_cast<size_t>(2 * net.size()), at_end);
  require_ok(lmtfast_cuda_compose(host.data(), device.data(), sigmas.data(), values.data(),
                                  jacobian.data(), other.data(), nullptr),
             "compose");
  CHECK(written(values));
  CHECK(written(jacobian));
  Outputs out{sigmas.values(), next.values(),    saved.values(), {},
              values.values(), jacobian.values()};
  for (const auto& g : gradients) {
    CHECK(written(*g));
    const auto part = g->values();
    out.gradients.insert(out.gradients.end(), part.begin(), part.end());
  }
  lmtfast::emulation::set_order(0);
  return out;
}

std::vector<Shape> shapes() {
  std::vector<Shape> result;
  for (const int64_t engine : {LMTFAST_OPERATOR, LMTFAST_SYMBOL, LMTFAST_SEPARABLE}) {
    const std::vector<Shape> some = {
        {"plain", engine, 1, 5, 7, {6, 7}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
        {"wide", engine, 1, 37, 70, {5, 3}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
        {"strided", engine, 1, 6, 5, {8, 9}, {3, 2}, {2, 3}, {1, 0}, {1, 2}},
        {"grouped", engine, 3, 2, 4, {5, 4}, {3, 3}, {1, 1}, {1, 1}, {1, 1}},
        {"line", engine, 1, 4, 3, {17}, {5}, {2}, {2}, {1}},
        {"volume", engine, 1, 2, 3, {3, 4, 5}, {3, 1, 2}, {1, 1, 2}, {1, 0, 1}, {1, 1, 1}},
    };
    result.insert(result.end(), some.begin(), some.end());
    Shape s = some[0];
    s.name = "scaled";
    s.channels = 5;
    s.scaled = s.tap_major = true;
    s.identity = 0.7;
    result.push_back(s);
    s.name = "scaled groups, bfloat16";
    s.groups = 2;
    s.bfloat16 = true;
    result.push_back(s);
    s = some[2];
    s.name = "transposed";
    s.transposed = s.scaled = true;
    result.push_back(s);
    s = some[0];
    s.name = "circular";
    s.circular = true;
    result.push_back(s);
  }
  result.push_back({"matrix", LMTFAST_OPERATOR, 1, 70, 33, {}, {}, {}, {}, {}});
  result.push_back({"scaled matrix",
                    LMTFAST_OPERATOR,
                    1,
                    9,
                    9,
                    {},
                    {},
                    {},
                    {},
                    {},
                    false,
                    false,
                    false,
                    true,
                    true,
                    2.0});
  return result;
}

void test_each_alone() {
  for (const Shape& shape : shapes()) {
    const int before = check::failures;
    for (const bool update : {true, false}) {
      const Network left({shape}, false), right({shape}, true);
      const Outputs outputs = run(left, false, update, 0);
      CHECK(outputs == run(right, true, update, 1));
    }
    if (check::failures > before)
      std::printf("in %s, engine %d\n", shape.name, static_cast<int>(shape.engine));
  }
}

void test_all_together() {
  const Network net(shapes(), true);
  // Room for both candidates of every symbol; then less and less for one, for x alone, for none.
  for (const int64_t kib : {227, 8, 5, 4}) {
    shared_bytes = kib << 10;
    const Outputs outputs = run(net, true, true, 0);
    for (const uint64_t seed : {1, 2}) CHECK(outputs == run(net, true, true, seed));
  }
  shared_bytes = 227 << 10;
}

void test_misuse() {
  const Network net({shapes()[0]}, true);
  int64_t size = 0, bytes = 0;
  CHECK(lmtfast_cuda_plan(nullptr, shared_bytes, nullptr, 0, &size, &bytes) ==
        LMTFAST_INVALID_ARGUMENT);
  require_ok(lmtfast_cuda_plan(&net.view(), shared_bytes, nullptr, 0, &size, &bytes), "plan");
  std::vector<int64_t> host(static_cast<size_t>(size));
  CHECK(lmtfast_cuda_plan(&net.view(), shared_bytes, host.data(), size - 1, &size, &bytes) ==
        LMTFAST_INVALID_ARGUMENT);
  require_ok(lmtfast_cuda_plan(&net.view(), shared_bytes, host.data(), size, &size, &bytes),
             "plan");
  alignas(16) unsigned char workspace[16];
  float any[4];
  CHECK(lmtfast_cuda_spectral_step(host.data(), host.data(), nullptr, 0, any, any, any, any,
                                   workspace, nullptr) == LMTFAST_INVALID_ARGUMENT);
  CHECK(lmtfast_cuda_spectral_step(host.data(), host.data(), net.tensors().data(), 1, any, any, any,
                                   any, workspace + 1, nullptr) == LMTFAST_INVALID_ARGUMENT);
  host[0] ^= 1;
  CHECK(lmtfast_cuda_compose(host.data(), host.data(), any, any, any, workspace, nullptr) ==
        LMTFAST_INVALID_ARGUMENT);
}

}  // namespace

int main() {
  test_each_alone();
  test_all_together();
  test_misuse();
  return check::report();
}
