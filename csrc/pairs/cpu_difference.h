// |x - y|^2 from the differences of the coordinates: a relative error of a few roundings, and 0 for equal points.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
#pragma once

#include <cmath>
#include <limits>

#include "pairs/cpu_tile.h"
#include "pairs/near.h"

namespace otface::pairs {
namespace {

// Panels of `panel` coordinates, `panel_stride` apart; the last may be partly filled.
template <class T>
struct TwoPoints {
  const T *x, *y;
  int64_t size, panel_stride;

  // The cost, or what it is without a product.
  template <Metric metric>
  T cost() const {
    const T square = square_of_difference();
    const bool in_range = square > least_square<T> && square <= std::numeric_limits<T>::max();
    return in_range ? cost_of_square<metric>(square) : cost_of_root<metric>(length_of_difference());
  }

  // f(x - y, place) for the vectors of coordinates, and for the coordinates that fill none.
  template <class F>
  OTFACE_INLINE void for_differences(const F& f) const {
    constexpr int64_t W = lanes<T>;
    int64_t k = 0;
    for (; k + W <= size; k += W) f(difference_at<Vec<T>>(place(k)), place(k));
    for (; k < size; ++k) f(difference_at<T>(place(k)), place(k));
  }

 private:
  OTFACE_INLINE int64_t place(int64_t k) const { return k / panel * panel_stride + k % panel; }

  template <class V>
  OTFACE_INLINE V difference_at(int64_t at) const {
    return load<V>(x + at) - load<V>(y + at);
  }

  // May leave the range of T. Four sums side by side, so that one addition need not wait for the last.
  T square_of_difference() const {
    using V = Vec<T>;
    constexpr int64_t W = lanes<T>;
    V sums[4] = {};
    int64_t k = 0;
    for (; k + 4 * W <= size; k += 4 * W) {
      OTFACE_UNROLL
      for (int q = 0; q < 4; ++q) {
        const V difference = difference_at<V>(place(k + q * W));
        sums[q] += difference * difference;
      }
    }
    for (; k + W <= size; k += W) {
      const V difference = difference_at<V>(place(k));
      sums[0] += difference * difference;
    }
    const Four<T> sum = sum_lanes(sums[0], sums[1], sums[2], sums[3]);
    T square = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (; k < size; ++k) square += difference_at<T>(place(k)) * difference_at<T>(place(k));
    return square;
  }

  // The squares are those of the differences over the largest one. Rarely needed.
  T length_of_difference() const {
    T largest = 0, sum = 0;
    for (int64_t k = 0; k < size; ++k) {
      const T difference = std::fabs(difference_at<T>(place(k)));
      if (difference != difference) return difference;
      largest = difference > largest ? difference : largest;
    }
    if (!(largest > 0 && largest <= std::numeric_limits<T>::max())) return largest;
    for (int64_t k = 0; k < size; ++k) {
      const T difference = difference_at<T>(place(k)) / largest;
      sum += difference * difference;
    }
    return largest * std::sqrt(sum);
  }
};

// f(j) for the entries begin <= j < end of a row of costs that are not far. s_of(V, j): s of entry j, or of a vector of
// them from there. f may change the cost of its entry.
template <Metric metric, class T, class S, class F>
OTFACE_INLINE void for_near(const T* cost, int64_t begin, int64_t end, T share, const S& s_of, const F& f) {
  using V = Vec<T>;
  constexpr int64_t W = lanes<T>;
  int64_t j = begin;
  for (; j + W <= end; j += W) {
    if (!any(~is_far<metric>(load<V>(cost + j), s_of(V{}, j), share))) continue;
    for (int64_t k = j; k < j + W; ++k)
      if (!is_far<metric>(cost[k], s_of(T{}, k), share)) f(k);
  }
  for (; j < end; ++j)
    if (!is_far<metric>(cost[j], s_of(T{}, j), share)) f(j);
}

}  // namespace
}  // namespace otface::pairs
