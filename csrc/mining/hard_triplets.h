// Which triplets of a mini-batch are hard. On the CPU only: how many there are is asked for before they are written.
#pragma once

#include <cstdint>

#include "common/executor.h"

namespace otface::mining {

// (a, p, n) with y_a = y_p, a != p, y_n != y_a, where neither is ignored, and excess = cos(a, n) - cos(a, p) > -alpha.
struct Batch {
  bool is_double;
  int64_t count;          // N
  const void* cosines;    // [N, N], contiguous, float or double; the comparison is in that type
  const int64_t* labels;  // [N]
  double alpha;
  bool has_ignored;
  int64_t ignore_index;  // the label of rows that are in no triplet, if there is one
};

// counts [N]: of each anchor. Returns their sum.
int64_t count_hard(const Batch& batch, int64_t* counts, const Executor& executor);

// In ascending order. triplets [T, 3]; excess [T], in the type of the cosines.
void write_hard(const Batch& batch, const int64_t* counts, int64_t* triplets, void* excess, const Executor& executor);

}  // namespace otface::mining
