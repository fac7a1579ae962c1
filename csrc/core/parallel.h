// SPDX-License-Identifier: MIT
// The only place that knows about threads.
#pragma once

#include <cstdint>

namespace lmtfast {

// Threads worth using: at most `requested` (0: all the machine offers), one per `grain` units of
// work.
int64_t choose_threads(int64_t requested, int64_t work, int64_t grain);

// Calls task(context, i) for i in [0, count) on up to `threads` threads. A task must not throw, and
// what it computes must not depend on which thread runs it.
void run_tasks(int64_t count, int64_t threads, void (*task)(void*, int64_t), void* context);

template <class Task>
void parallel_for(int64_t count, int64_t threads, Task&& task) {
  run_tasks(
      count, threads, [](void* context, int64_t i) { (*static_cast<Task*>(context))(i); }, &task);
}

}  // namespace lmtfast
