// What the gradients of the costs are worth to the points: S_i += G_k U_j, S_j += G_k^T U_i.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// A task is one set, or some of its dimensions, with all its partners, so that tasks write to different places. The order
// of a sum is the same for any number of threads: the pairs where the set is first, then those where it is second, each in
// the order of the list. Per pair 2 p^2 d multiply-adds. Its two tasks read G_k, p^2 Reals, and the partner, p d; S, also
// p d, is read and written in the second-level cache.
#pragma once

#include "common/cpu_buffer.h"
#include "common/cpu_run.h"
#include "pairs/cpu_tile.h"

namespace otface::pairs {
namespace {

// The places in the list of each set, in order: pairs[begin[s]] .. pairs[begin[s + 1] - 1].
class PairsOfSets {
 public:
  PairsOfSets(const int64_t* sets, int64_t count, int64_t total) {
    int64_t* begin = begin_.resize(total + 2);
    int64_t* pairs = pairs_.resize(count);
    for (int64_t s = 0; s < total + 2; ++s) begin[s] = 0;
    for (int64_t k = 0; k < count; ++k) ++begin[sets[k] + 2];
    for (int64_t s = 2; s < total + 2; ++s) begin[s] += begin[s - 1];
    for (int64_t k = 0; k < count; ++k) pairs[begin[sets[k] + 1]++] = k;
  }
  bool none_of(int64_t set) const { return begin_[set] == begin_[set + 1]; }
  // f(k) for each pair of a set
  template <class F>
  void for_each(int64_t set, const F& f) const {
    for (int64_t at = begin_[set]; at < begin_[set + 1]; ++at) f(pairs_[at]);
  }

 private:
  Buffer<int64_t> begin_, pairs_;
};

// s += g b for the panels [begin, end): g_rq at g + r * row + q * step.
template <class T>
void add_product(int64_t points, const T* g, int64_t row, int64_t step, const T* b, T* s, int64_t begin, int64_t end) {
  constexpr int64_t per_panel = panel / lanes<T>;
  const int64_t panel_stride = points * panel;
  for_vector_groups((end - begin) * per_panel, [&](int64_t v, auto vectors) {
    const int64_t at = begin * panel_stride + vector_at<T>(v, panel_stride);
    for_row_tiles(points, [&](int64_t r, auto tile_rows) {
      constexpr int R = decltype(tile_rows)::value, C = decltype(vectors)::value;
      Tile<T, R, C> tile;
      T* to = s + at + r * panel;
      tile.add(points, g + r * row, row, step, b + at, panel_stride);
      tile.for_each([&](int q, int c, Vec<T> sum) {
        T* place = to + q * panel + vector_at<T>(c, panel_stride);
        store(place, load<Vec<T>>(place) + sum);
      });
    });
  });
}

template <class T>
void gradient(const GradientParams& p, const Executor& executor) {
  const int64_t sets = p.shape.sets, points = p.shape.points, depth = depth_of(p.shape.size);
  if (sets == 0) return;
  const PairsOfSets as_first(p.pairs.first, p.pairs.count, sets), as_second(p.pairs.second, p.pairs.count, sets);
  const T *rows = static_cast<const T*>(p.rows), *grad_cost = static_cast<const T*>(p.grad_cost);
  T* sums = static_cast<T*>(p.sums);
  const int64_t set_stride = depth * points * panel;
  int64_t present = 0;
  for (int64_t s = 0; s < sets; ++s) present += !as_first.none_of(s) || !as_second.none_of(s);
  // Some tasks per thread, so that no thread waits long for another; whole groups of vectors.
  constexpr int64_t group = most_vectors > panel / lanes<T> ? most_vectors / (panel / lanes<T>) : 1;
  const int64_t most_parts = (depth + group - 1) / group,
                wanted = 8 * executor.threads / (present > 0 ? present : 1) + 1;
  const int64_t parts = wanted < most_parts ? wanted : most_parts;
  const auto add_to_part = [&](int64_t set, int64_t part) {
    const int64_t begin = most_parts * part / parts * group, past = most_parts * (part + 1) / parts * group;
    const int64_t end = past < depth ? past : depth;
    T* s = sums + set * set_stride;
    as_first.for_each(set, [&](int64_t k) {
      add_product(points, grad_cost + k * points * points, points, 1, rows + p.pairs.second[k] * set_stride, s, begin,
                  end);
    });
    as_second.for_each(set, [&](int64_t k) {
      add_product(points, grad_cost + k * points * points, 1, points, rows + p.pairs.first[k] * set_stride, s, begin,
                  end);
    });
  };
  run_in_turn(executor, sets * parts, [&](const auto& next) {
    for (int64_t task = next(); task >= 0; task = next()) add_to_part(task / parts, task % parts);
  });
}

}  // namespace
}  // namespace otface::pairs
