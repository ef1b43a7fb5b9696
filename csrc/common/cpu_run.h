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

// work(next) once per thread: next() is a task of [0, tasks) that nobody has taken, or -1 when none is left. For tasks that
// take unlike times.
template <class Work>
void run_in_turn(const Executor& executor, int64_t tasks, const Work& work) {
  int64_t taken = 0;
  const auto next = [&]() -> int64_t {
    const int64_t task = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
    return task < tasks ? task : -1;
  };
  if (tasks > 0) run(executor, tasks < executor.threads ? tasks : executor.threads, [&](int64_t) { work(next); });
}

}  // namespace
}  // namespace otface
