// SPDX-License-Identifier: MIT
#include "core/parallel.h"

#include <algorithm>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace lmtfast {

int64_t choose_threads(int64_t requested, int64_t work, int64_t grain) {
#if defined(_OPENMP)
  const int64_t available = omp_get_max_threads();
#else
  const int64_t available = std::max(1u, std::thread::hardware_concurrency());
#endif
  const int64_t wanted = requested > 0 ? requested : available;
  return std::clamp<int64_t>(work / grain, 1, wanted);
}

#if defined(_OPENMP)

// OpenMP rather than threads of our own: a host framework that uses the same runtime shares its
// warm pool with us.
void run_tasks(int64_t count, int64_t threads, void (*task)(void*, int64_t), void* context) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) \
    num_threads(static_cast<int>(std::min(threads, count)))
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

#else

void run_tasks(int64_t count, int64_t threads, void (*task)(void*, int64_t), void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i = next++; i < count; i = next++) task(context, i);
  };
  std::vector<std::thread> pool;
  pool.reserve(static_cast<size_t>(std::max<int64_t>(0, std::min(threads, count) - 1)));
  try {
    while (pool.size() < pool.capacity()) pool.emplace_back(work);
  } catch (const std::system_error&) {
    // The system refuses more threads: those that started, and this one, do the work.
  }
  work();
  for (auto& thread : pool) thread.join();
}

#endif

}  // namespace lmtfast
