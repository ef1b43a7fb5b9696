// Tasks on the threads of an executor.
// Part of the translation unit of one instruction set, like vec.h.
#pragma once

#include "common/executor.h"

namespace otface {
namespace {

// f(task) for every task in [0, tasks).
template <class F>
void run(const Executor& executor, int64_t tasks, const F& f) {
  if (tasks == 1) {
    f(static_cast<int64_t>(0));
    return;
  }
  executor.run(
      tasks, [](void* context, int64_t task) { (*static_cast<const F*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// f(begin, end) for every stretch of at most `grain` of [0, count).
template <class F>
void run_stretches(const Executor& executor, int64_t count, int64_t grain, const F& f) {
  const int64_t tasks = (count + grain - 1) / grain;
  if (tasks > 0)
    run(executor, tasks, [&](int64_t task) {
      const int64_t begin = task * grain, end = begin + grain;
      f(begin, end < count ? end : count);
    });
}

}  // namespace
}  // namespace otface
