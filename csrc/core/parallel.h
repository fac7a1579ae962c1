// SPDX-License-Identifier: MIT
// The only place that knows about threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace lmtfast {

// Threads worth using: at most `requested` (0: all the machine offers), one per `grain` units of
// work.
int64_t choose_threads(int64_t requested, int64_t work, int64_t grain);

// Calls task(context, i) for i in [0, count) on up to `threads` threads. A task must not throw, and
// what it computes must not depend on which thread runs it.
void run_tasks(int64_t count, int64_t threads, void (*task)(void*, int64_t), void* context);

// Calls task(i) as run_tasks does. Of the exceptions that tasks throw, one is thrown again here.
template <class Task>
void parallel_for(int64_t count, int64_t threads, Task&& task) {
  struct Context {
    Task& task;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error = nullptr;
  } context{task};
  run_tasks(
      count, threads,
      [](void* data, int64_t i) {
        auto& self = *static_cast<Context*>(data);
        try {
          self.task(i);
        } catch (...) {
          if (!self.failed.test_and_set()) self.error = std::current_exception();
        }
      },
      &context);
  if (context.error) std::rethrow_exception(context.error);
}

}  // namespace lmtfast
