// SPDX-License-Identifier: MIT
#include "cuda_emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace lmtfast::emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kMaxThreads = 1024;
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kPoison = 0xFF;
constexpr unsigned char kGuard = 0xA5;

enum class State { kReady, kAtBarrier, kAtWarp, kFinished };

struct Where {
  const char* file = "";
  int line = 0;
  bool operator!=(const Where& o) const { return line != o.line || std::strcmp(file, o.file) != 0; }
};

// A context that is entered once, then resumed by longjmp: setjmp saves no signal mask, so a switch
// costs no system call.
struct Fiber {
  std::jmp_buf resume;
  State state = State::kFinished;
  bool started = false;
  int index = 0;
  dim3 thread;
  Where where;
  // Two payloads in turn: a lane may already bring its next one while another still reads.
  unsigned turn = 0;
  unsigned char payload[2][kPayloadBytes];
};

class Machine {
 public:
  ~Machine() {
    if (stacks_ != nullptr) munmap(stacks_, kMaxThreads * kStackBytes);
  }

  void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
           const std::function<void()>& body);
  void barrier(Where where);
  void meet(unsigned mask, const void* payload, size_t bytes, Where where);
  const void* payload_of(int lane, Where where);
  [[noreturn]] void fault(const std::string& what, Where where);

  Fiber& self() { return *current_; }
  uint64_t seed = 0;
  uint64_t serial = 0;
  int64_t launches = 0;
  int64_t shared_limit = 227 << 10;
  Place place;
  std::vector<unsigned char> shared;

 private:
  void run_block(int threads);
  void enter(Fiber& fiber);
  void yield();
  void release_barrier(int threads);
  [[noreturn]] void raise(const std::string& what);
  static void start();

  std::jmp_buf scheduler_;
  std::vector<Fiber> fibers_ = std::vector<Fiber>(kMaxThreads);
  std::vector<int> order_;
  std::mt19937_64 random_;
  void* stacks_ = nullptr;
  Fiber* current_ = nullptr;
  int threads_ = 0;
  const char* kernel_ = "";
  const std::function<void()>* body_ = nullptr;
  std::string fault_;
};

Machine& machine() {
  static thread_local Machine instance;
  return instance;
}

std::string text(Where where) { return std::string(where.file) + ":" + std::to_string(where.line); }

std::string text(dim3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

void Machine::raise(const std::string& what) {
  // Fibers that did not finish are abandoned: their stacks are entered anew by the next launch.
  for (auto& fiber : fibers_) fiber.started = false;
  throw std::runtime_error(std::string(kernel_) + ": " + what + ", block " + text(place.block));
}

void Machine::start() {
  Machine& m = machine();
  while (true) {
    (*m.body_)();
    Fiber& fiber = m.self();
    fiber.state = State::kFinished;
    m.yield();
  }
}

void Machine::yield() {
  if (_setjmp(current_->resume) == 0) _longjmp(scheduler_, 1);
}

void Machine::enter(Fiber& fiber) {
  current_ = &fiber;
  place.thread = fiber.thread;
  if (_setjmp(scheduler_) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = static_cast<char*>(stacks_) + fiber.index * kStackBytes;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, &Machine::start, 0);
  setcontext(&context);
}

void Machine::fault(const std::string& what, Where where) {
  fault_ = what + " at " + text(where) + ", thread " + text(current_->thread);
  while (true) yield();
}

void Machine::barrier(Where where) {
  current_->state = State::kAtBarrier;
  current_->where = where;
  yield();
}

void Machine::release_barrier(int threads) {
  for (int i = 1; i < threads; ++i) {
    if (fibers_[i].where != fibers_[0].where) {
      raise("threads wait at different barriers, " + text(fibers_[0].where) + " and " +
            text(fibers_[i].where));
    }
  }
  for (int i = 0; i < threads; ++i) fibers_[i].state = State::kReady;
}

void Machine::meet(unsigned mask, const void* payload, size_t bytes, Where where) {
  Fiber& me = *current_;
  const int warp = me.index / kWarp * kWarp;
  if (mask != 0xFFFFFFFFu) fault("a mask that leaves lanes out", where);
  if (bytes > kPayloadBytes) fault("a payload that is too large", where);
  me.turn ^= 1u;
  if (bytes != 0) std::memcpy(me.payload[me.turn], payload, bytes);
  me.state = State::kAtWarp;
  me.where = where;
  for (int i = 0; i < kWarp; ++i) {
    const Fiber& other = fibers_[warp + i];
    if (other.state != State::kAtWarp) return yield();
    if (other.where != where) {
      fault("lanes of one warp at different places, the other at " + text(other.where), where);
    }
  }
  for (int i = 0; i < kWarp; ++i) fibers_[warp + i].state = State::kReady;
}

const void* Machine::payload_of(int lane, Where where) {
  const int warp = current_->index / kWarp * kWarp;
  if (lane < 0 || lane >= kWarp) fault("a lane that does not exist is read", where);
  return fibers_[warp + lane].payload[current_->turn];
}

void Machine::run_block(int threads) {
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.state = State::kReady;
    fiber.turn = 0;
  }
  order_.resize(static_cast<size_t>(threads));
  std::iota(order_.begin(), order_.end(), 0);
  for (int finished = 0; finished < threads;) {
    if (seed != 0) std::shuffle(order_.begin(), order_.end(), random_);
    bool moved = false;
    int waiting = 0;
    for (const int i : order_) {
      Fiber& fiber = fibers_[i];
      if (fiber.state == State::kReady) {
        enter(fiber);
        if (!fault_.empty()) raise(fault_);
        moved = true;
        finished += fiber.state == State::kFinished;
      }
      waiting += fiber.state == State::kAtBarrier;
    }
    if (waiting == threads) {
      release_barrier(threads);
    } else if (!moved) {
      std::string what = std::to_string(finished) + " of " + std::to_string(threads) +
                         " threads have returned, others wait for ever";
      for (int i = 0; i < threads; ++i) {
        if (fibers_[i].state == State::kFinished) continue;
        what += "; thread " + text(fibers_[i].thread) + " at " + text(fibers_[i].where);
        break;
      }
      raise(what);
    }
  }
}

void Machine::run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                  const std::function<void()>& body) {
  kernel_ = kernel;
  body_ = &body;
  fault_.clear();
  place.grid = grid;
  place.block_size = block;
  place.block = dim3(0, 0, 0);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || threads % kWarp != 0) {
    raise("a block of " + std::to_string(threads) + " threads, not whole warps up to 1024");
  }
  if (static_cast<int64_t>(shared_bytes) > shared_limit) {
    raise(std::to_string(shared_bytes) + " bytes of shared memory, which the device has not");
  }
  ++launches;
  if (blocks == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    raise("a grid of illegal size " + text(grid));
  }
  if (stacks_ == nullptr) {
    stacks_ = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks_ == MAP_FAILED) {
      stacks_ = nullptr;
      raise("no memory for stacks");
    }
  }
  for (int i = 0; i < static_cast<int>(threads); ++i) {
    const auto index = static_cast<unsigned>(i);
    fibers_[i].index = i;
    fibers_[i].thread =
        dim3(index % block.x, index / block.x % block.y, index / (block.x * block.y));
  }
  random_.seed(seed);
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t{0});
  if (seed != 0) std::shuffle(order.begin(), order.end(), random_);
  for (const uint64_t b : order) {
    place.block =
        dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
             static_cast<unsigned>(b / grid.x / grid.y));
    ++serial;
    shared.assign(shared_bytes + kGuardBytes + 128, kPoison);
    auto* base = static_cast<unsigned char*>(dynamic_shared());
    std::fill(base + shared_bytes, base + shared_bytes + kGuardBytes, kGuard);
    run_block(static_cast<int>(threads));
    if (std::any_of(base + shared_bytes, base + shared_bytes + kGuardBytes,
                    [](unsigned char byte) { return byte != kGuard; })) {
      raise("a write past the dynamic shared memory");
    }
  }
}

}  // namespace

void set_order(uint64_t seed) { machine().seed = seed; }

int64_t shared_limit() { return machine().shared_limit; }
void set_shared_limit(int64_t bytes) { machine().shared_limit = bytes; }

int64_t count_launches(bool reset) {
  const int64_t count = machine().launches;
  if (reset) machine().launches = 0;
  return count;
}

void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes,
         const std::function<void()>& body) {
  machine().run(kernel, grid, block, shared_bytes, body);
}

const Place& place() { return machine().place; }

void fault(const char* what, const char* file, int line) { machine().fault(what, {file, line}); }

void sync_threads(const char* file, int line) { machine().barrier({file, line}); }

void exchange(unsigned mask, const void* payload, size_t bytes, const char* file, int line) {
  machine().meet(mask, payload, bytes, {file, line});
}

const void* payload_of(int lane, const char* file, int line) {
  return machine().payload_of(lane, {file, line});
}

int lane() { return machine().self().index % kWarp; }

void* dynamic_shared() {
  const auto start = reinterpret_cast<uintptr_t>(machine().shared.data());
  return reinterpret_cast<void*>((start + 127) / 128 * 128);
}

uint64_t block_serial() { return machine().serial; }

}  // namespace lmtfast::emulation
