// SPDX-License-Identifier: MIT
// The emulation itself: what a kernel computes is what CUDA defines, and a kernel that CUDA leaves
// undefined is caught. Every faulty kernel below has the repaired one beside it.
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "core/device.h"
#include "core/status.h"
#include "ops/cuda/team.h"

namespace {

using lmtfast::DeviceError;
constexpr unsigned kAll = 0xFFFFFFFFu;

// The message of the fault that `start` meets, or "" if it meets none.
template <class Start>
std::string fault_of(Start&& start) {
  try {
    start();
  } catch (const DeviceError& error) {
    return error.what();
  }
  return "";
}

bool says(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

__global__ void indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned size = blockDim.x * blockDim.y * blockDim.z;
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * size + thread] += static_cast<int>(block * size + thread);
}

void test_every_thread_runs_once() {
  std::vector<int> out(2 * 3 * 4 * 64, 0);
  LMTFAST_LAUNCH(indices, dim3(2, 3, 4), dim3(8, 4, 2), 0, nullptr, out.data());
  for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == static_cast<int>(i));
}

__global__ void warp_functions(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned odd = __ballot_sync(kAll, lane % 2 == 1);
  int sum = lane;
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kAll, sum, bits);
  const int beyond = __shfl_down_sync(kAll, lane, 5);
  const int third = __shfl_sync(kAll, lane, 3);
  __syncwarp();
  out[threadIdx.x] = odd == 0xAAAAAAAAu && sum == 496 && beyond == (lane < 27 ? lane + 5 : lane) &&
                     third == 3 && __popc(odd) == 16;
}

void test_warp_functions() {
  std::vector<int> out(96, 0);
  LMTFAST_LAUNCH(warp_functions, 1, 96, 0, nullptr, out.data());
  for (const int ok : out) CHECK(ok == 1);
}

template <bool kBarrier>
__global__ void reverse(int* out) {
  LMTFAST_SHARED(int, tile, [64]);
  tile[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

// Ascending order alone would let half of the threads read what was not written yet: 0xFF.
void test_a_missing_barrier_shows() {
  std::vector<int> out(64);
  LMTFAST_LAUNCH(reverse<true>, 1, 64, 0, nullptr, out.data());
  for (int i = 0; i < 64; ++i) CHECK(out[i] == 63 - i);
  LMTFAST_LAUNCH(reverse<false>, 1, 64, 0, nullptr, out.data());
  CHECK(out[0] == -1);
}

template <bool kRepaired>
__global__ void barrier_in_a_branch() {
  if (kRepaired || threadIdx.x < 32) __syncthreads();
}

template <bool kRepaired>
__global__ void return_before_a_barrier() {
  if (!kRepaired && threadIdx.x == 5) return;
  __syncthreads();
}

template <bool kRepaired>
__global__ void two_barriers() {
  if (kRepaired || threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

template <bool kRepaired>
__global__ void shuffle_in_a_branch(int* out) {
  int value = 7;
  if (kRepaired || threadIdx.x < 16) value = __shfl_sync(kAll, value, 0);
  out[threadIdx.x] = value;
}

template <bool kRepaired>
__global__ void partial_mask(int* out) {
  out[threadIdx.x] = __shfl_sync(kRepaired ? kAll : 0xFFFFu, 1, 0);
}

template <bool kRepaired>
__global__ void write_past_the_end(int* out) {
  LMTFAST_DYNAMIC_SHARED(int, tile);
  tile[threadIdx.x + (kRepaired ? 0 : 1)] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

template <bool kRepaired>
__global__ void misaligned_access(const float* in) {
  LMTFAST_ALIGNED(in + (kRepaired ? 0 : 1), 16);
}

template <template <bool> class Kernel, class... Arguments>
void check_pair(const char* part, size_t shared_bytes, Arguments... arguments) {
  CHECK(fault_of([&] {
          LMTFAST_LAUNCH(Kernel<true>::get(), 2, 64, shared_bytes, nullptr, arguments...);
        }) == "");
  const std::string fault = fault_of(
      [&] { LMTFAST_LAUNCH(Kernel<false>::get(), 2, 64, shared_bytes, nullptr, arguments...); });
  CHECK(says(fault, part));
  CHECK(says(fault, "block ("));
}

#define KERNEL(name)                              \
  template <bool kRepaired>                       \
  struct name##_kernel {                          \
    static auto get() { return name<kRepaired>; } \
  }
KERNEL(barrier_in_a_branch);
KERNEL(return_before_a_barrier);
KERNEL(two_barriers);
KERNEL(shuffle_in_a_branch);
KERNEL(partial_mask);
KERNEL(write_past_the_end);
KERNEL(misaligned_access);

void test_faults() {
  std::vector<int> out(64);
  for (const uint64_t seed : {0, 1, 2}) {
    lmtfast::emulation::set_order(seed);
    check_pair<barrier_in_a_branch_kernel>("have returned, others wait for ever", 0);
    check_pair<return_before_a_barrier_kernel>("1 of 64 threads have returned", 0);
    check_pair<two_barriers_kernel>("different barriers", 0);
    check_pair<shuffle_in_a_branch_kernel>("wait for ever", 0, out.data());
    check_pair<partial_mask_kernel>("a mask that leaves lanes out", 0, out.data());
    check_pair<write_past_the_end_kernel>("past the dynamic shared memory", 64 * sizeof(int),
                                          out.data());
  }
  alignas(16) const float values[8] = {};
  check_pair<misaligned_access_kernel>("misaligned access", 0, static_cast<const float*>(values));
  lmtfast::emulation::set_order(0);
  // A block may have what the device has, and no more.
  const int64_t limit = lmtfast::emulation::shared_limit();
  const auto reversed = [&] {
    LMTFAST_LAUNCH(reverse<true>, 1, 64, 64 * sizeof(int), nullptr, out.data());
  };
  lmtfast::emulation::set_shared_limit(64 * sizeof(int) - 1);
  CHECK(says(fault_of(reversed), "256 bytes of shared memory, which the device has not"));
  lmtfast::emulation::set_shared_limit(64 * sizeof(int));
  lmtfast::emulation::count_launches(true);
  CHECK(fault_of(reversed) == "");
  CHECK(lmtfast::emulation::count_launches(false) == 1);
  lmtfast::emulation::set_shared_limit(limit);
  const auto empty = [] { LMTFAST_LAUNCH(barrier_in_a_branch<true>, 1, 48, 0, nullptr); };
  CHECK(says(fault_of(empty), "whole warps"));
  LMTFAST_LAUNCH(barrier_in_a_branch<false>, 0, 64, 0, nullptr);
}

// A block that needs the one before it, and a sum that does not.
__global__ void chain(int* out) {
  if (threadIdx.x == 0) out[blockIdx.x + 1] = out[blockIdx.x] + 1;
}
__global__ void count(int* out) { atomicAdd(out, 1); }

// The block that is done last sees what all have written.
__global__ void sum_by_the_last(int* counter, int* parts, int* out) {
  parts[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (!lmtfast::cuda::last_of(counter, static_cast<int32_t>(gridDim.x))) return;
  int sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) sum += parts[i];
  atomicAdd(out, sum);
}

void test_random_orders() {
  int differing = 0;
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    lmtfast::emulation::set_order(seed);
    std::vector<int> out(9, 0);
    LMTFAST_LAUNCH(chain, 8, 32, 0, nullptr, out.data());
    differing += out[8] != 8;
    out[0] = 0;
    LMTFAST_LAUNCH(count, 8, 32, 0, nullptr, out.data());
    CHECK(out[0] == 256);
    std::vector<int> parts(7 * 64, 0), done(2, 0);
    LMTFAST_LAUNCH(sum_by_the_last, 7, 64, 0, nullptr, &done[0], parts.data(), &done[1]);
    CHECK(done[0] == 7);
    CHECK(done[1] == 7 * 64);
  }
  lmtfast::emulation::set_order(0);
  CHECK(differing == 5);
}

void test_shared_memory_does_not_leak_into_the_next_block() {
  std::vector<int> out(64);
  LMTFAST_LAUNCH(reverse<true>, 1, 64, 0, nullptr, out.data());
  LMTFAST_LAUNCH(reverse<false>, 1, 64, 0, nullptr, out.data());
  CHECK(out[0] == -1);
}

void test_bfloat16_rounds_to_nearest_even() {
  using lmtfast::cuda::bfloat16;
  const auto bits = [](float x) {
    bfloat16 y;
    lmtfast::cuda::narrow(x, y);
    return y.bits;
  };
  CHECK(bits(1.0f) == 0x3F80);
  CHECK(bits(1.00390625f) == 0x3F80);  // halfway to the next: the even one
  CHECK(bits(1.01171875f) == 0x3F82);
  CHECK(bits(-2.5f) == 0xC020);
  CHECK(bits(3.4e38f) == 0x7F80);
  CHECK(bits(1e-40f) == 0x0001);
  CHECK(bits(0.0f) == 0);
  const float nan = std::bit_cast<float>(0x7F800001u);
  bfloat16 y;
  lmtfast::cuda::narrow(nan, y);
  CHECK(std::isnan(lmtfast::cuda::widen(y)));
  for (int i = 0; i < 0x10000; ++i) {
    const float value = lmtfast::cuda::widen(bfloat16{static_cast<uint16_t>(i)});
    if (!std::isnan(value)) CHECK(bits(value) == i);
  }
}

}  // namespace

int main() {
  test_every_thread_runs_once();
  test_warp_functions();
  test_a_missing_barrier_shows();
  test_faults();
  test_random_orders();
  test_shared_memory_does_not_leak_into_the_next_block();
  test_bfloat16_rounds_to_nearest_even();
  return check::report();
}
