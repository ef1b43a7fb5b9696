// How a CPU kernel asks for threads, without knowing who owns them (torch's pool in the extension).
#pragma once

#include <cstdint>

namespace otface {

struct Executor {
  int threads;
  // Calls body(context, task) for every task in [0, tasks), on any thread and in any order.
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t task), void* context);
};

// Static, so that each translation unit keeps its own copy, compiled for its own instruction set.
static inline void run_serially(int64_t tasks, void (*body)(void* context, int64_t task), void* context) {
  for (int64_t task = 0; task < tasks; ++task) body(context, task);
}

}  // namespace otface
