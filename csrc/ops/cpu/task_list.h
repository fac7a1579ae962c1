// SPDX-License-Identifier: MIT
// Lists of independent tasks on a fixed number of workers, each with memory of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/parallel.h"

namespace lmtfast::cpu {

// Multiply-adds that pay for waking a thread, tasks per thread of a list of products, and entries of
// a task that goes through vectors.
constexpr int64_t kGrain = 1 << 21;
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kChunk = 1 << 14;

class Workers {
 public:
  // Memory is not initialised.
  Workers(int64_t threads, int64_t floats)
      : threads_(threads),
        floats_((floats + 15) / 16 * 16),
        memory_(new float[static_cast<size_t>(threads_ * floats_)]) {}

  int64_t threads() const { return threads_; }

  // Calls work(task, workspace) for every task, first come, first served.
  template <class Task, class Work>
  void run(const std::vector<Task>& tasks, Work&& work) {
    std::atomic<size_t> next{0};
    const int64_t workers = std::min<int64_t>(threads_, static_cast<int64_t>(tasks.size()));
    parallel_for(workers, workers, [&](int64_t worker) {
      float* workspace = memory_.get() + worker * floats_;
      for (size_t i = next++; i < tasks.size(); i = next++) work(tasks[i], workspace);
    });
  }

 private:
  int64_t threads_, floats_;
  std::unique_ptr<float[]> memory_;
};

}  // namespace lmtfast::cpu
