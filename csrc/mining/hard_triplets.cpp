#include "mining/hard_triplets.h"

#include <cstddef>
#include <numeric>
#include <vector>

#include "common/cpu_run.h"

namespace otface::mining {
namespace {

// f(p) for every positive of an anchor.
template <class F>
void for_each_positive(const Batch& batch, int64_t anchor, const F& f) {
  const int64_t label = batch.labels[anchor];
  if (batch.has_ignored && label == batch.ignore_index) return;
  for (int64_t p = 0; p < batch.count; ++p)
    if (p != anchor && batch.labels[p] == label) f(p);
}

// Whether a row can be the negative of an anchor, for all rows.
void mark_negatives(const Batch& batch, int64_t anchor, unsigned char* is_negative) {
  const int64_t label = batch.labels[anchor];
  for (int64_t n = 0; n < batch.count; ++n)
    is_negative[n] = batch.labels[n] != label && !(batch.has_ignored && batch.labels[n] == batch.ignore_index) ? 1 : 0;
}

template <class T>
int64_t count_of_anchor(const Batch& batch, int64_t anchor, unsigned char* is_negative) {
  const T* cosines = static_cast<const T*>(batch.cosines) + anchor * batch.count;
  const T least = static_cast<T>(-batch.alpha);
  bool is_marked = false;
  int64_t total = 0;
  for_each_positive(batch, anchor, [&](int64_t p) {
    if (!is_marked) mark_negatives(batch, anchor, is_negative);
    is_marked = true;
    const T of_positive = cosines[p];
    for (int64_t n = 0; n < batch.count; ++n) total += is_negative[n] & (cosines[n] - of_positive > least ? 1 : 0);
  });
  return total;
}

template <class T>
void write_of_anchor(const Batch& batch, int64_t anchor, unsigned char* is_negative, int64_t* triplets, T* excess) {
  const T* cosines = static_cast<const T*>(batch.cosines) + anchor * batch.count;
  const T least = static_cast<T>(-batch.alpha);
  mark_negatives(batch, anchor, is_negative);
  for_each_positive(batch, anchor, [&](int64_t p) {
    for (int64_t n = 0; n < batch.count; ++n) {
      const T difference = cosines[n] - cosines[p];
      if (!(is_negative[n] && difference > least)) continue;
      *triplets++ = anchor;
      *triplets++ = p;
      *triplets++ = n;
      *excess++ = difference;
    }
  });
}

}  // namespace

int64_t count_hard(const Batch& batch, int64_t* counts, const Executor& executor) {
  run_stretches(executor, batch.count, 16, [&](int64_t begin, int64_t end) {
    std::vector<unsigned char> is_negative(static_cast<std::size_t>(batch.count));
    for (int64_t a = begin; a < end; ++a)
      counts[a] = batch.is_double ? count_of_anchor<double>(batch, a, is_negative.data())
                                  : count_of_anchor<float>(batch, a, is_negative.data());
  });
  return std::accumulate(counts, counts + batch.count, static_cast<int64_t>(0));
}

void write_hard(const Batch& batch, const int64_t* counts, int64_t* triplets, void* excess, const Executor& executor) {
  std::vector<int64_t> first(static_cast<std::size_t>(batch.count) + 1, 0);
  std::partial_sum(counts, counts + batch.count, first.begin() + 1);
  run_stretches(executor, batch.count, 16, [&](int64_t begin, int64_t end) {
    std::vector<unsigned char> is_negative(static_cast<std::size_t>(batch.count));
    for (int64_t a = begin; a < end; ++a) {
      const int64_t at = first[static_cast<std::size_t>(a)];
      if (counts[a] == 0) continue;
      if (batch.is_double)
        write_of_anchor<double>(batch, a, is_negative.data(), triplets + 3 * at, static_cast<double*>(excess) + at);
      else
        write_of_anchor<float>(batch, a, is_negative.data(), triplets + 3 * at, static_cast<float*>(excess) + at);
    }
  });
}

}  // namespace otface::mining
