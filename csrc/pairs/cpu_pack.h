// Between points as users hold them and the order that the products read: unit length in, and its gradient out.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// A task is one set, which fits in the second-level cache: it is read once and written once in each order.
#pragma once

#include <cmath>

#include "common/cpu_buffer.h"
#include "common/cpu_half.h"
#include "common/cpu_run.h"
#include "pairs/cpu_tile.h"

namespace otface::pairs {
namespace {

// x [p, d] -> rows [D, p, panel], zero in the padding; in the order in which x lies in memory.
template <class T, class S, class Convert>
void copy_to_rows(const S* x, int64_t point_stride, int64_t stride, int64_t points, int64_t size, T* rows,
                  const Convert& convert) {
  for (int64_t first = 0, block = 0; first < size; first += panel, ++block) {
    const int64_t count = size - first < panel ? size - first : panel;
    T* out = rows + block * points * panel;
    if (count < panel)
      for (int64_t i = 0; i < points * panel; ++i) out[i] = 0;
    if (stride == 1) {
      for (int64_t i = 0; i < points; ++i)
        for (int64_t k = 0; k < count; ++k)
          out[i * panel + k] = static_cast<T>(convert(x[i * point_stride + first + k]));
    } else {
      for (int64_t k = 0; k < count; ++k)
        for (int64_t i = 0; i < points; ++i)
          out[i * panel + k] = static_cast<T>(convert(x[i * point_stride + (first + k) * stride]));
    }
  }
}

template <class T>
void read_set(const PackParams& p, int64_t set, T* rows) {
  const PointsView& x = p.points;
  const auto copy = [&]<class S>(const S*, auto convert) {
    copy_to_rows(static_cast<const S*>(x.data) + set * x.set_stride, x.point_stride, x.stride, p.shape.points,
                 p.shape.size, rows, convert);
  };
  switch (x.dtype) {
    case DType::float32: return copy(static_cast<const float*>(nullptr), [](float v) { return v; });
    case DType::float64: return copy(static_cast<const double*>(nullptr), [](double v) { return v; });
    case DType::float16: return copy(static_cast<const uint16_t*>(nullptr), half_to_float);
    case DType::bfloat16: return copy(static_cast<const uint16_t*>(nullptr), bfloat_to_float);
  }
}

// f(vector, its place) for the vectors of point i of a set in rows.
template <class T, class F>
OTFACE_INLINE void for_vectors(int64_t i, int64_t points, int64_t depth, const F& f) {
  for (int64_t block = 0; block < depth; ++block)
    for (int64_t k = 0; k < panel; k += lanes<T>) f((block * points + i) * panel + k);
}

// Makes point i a unit vector, or leaves it zero, and returns its length.
template <class T>
double normalise(T* rows, int64_t i, int64_t points, int64_t depth) {
  using V = Vec<T>;
  const auto sum_of_squares = [&] {
    V sum{};
    for_vectors<T>(i, points, depth, [&](int64_t at) {
      const V v = load<V>(rows + at);
      sum += v * v;
    });
    return static_cast<double>(sum_lanes(sum));
  };
  const auto scale = [&](T factor) {
    for_vectors<T>(i, points, depth, [&](int64_t at) { store(rows + at, load<V>(rows + at) * factor); });
  };
  // Squares within the range of T, with room for the smaller ones to count.
  constexpr double least = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon() /
                           std::numeric_limits<T>::epsilon(),
                   most = std::numeric_limits<T>::max() / 2;
  double sum = sum_of_squares();
  if (sum > least && sum < most) {
    const double length = std::sqrt(sum);
    scale(static_cast<T>(1 / length));
    return length;
  }
  T largest = 0;
  bool finite = true;
  for_vectors<T>(i, points, depth, [&](int64_t at) {
    for (int64_t k = 0; k < lanes<T>; ++k) {
      const T x = std::fabs(rows[at + k]);
      finite = finite && x < static_cast<T>(INFINITY);
      largest = x > largest ? x : largest;
    }
  });
  if (!finite) {
    scale(static_cast<T>(NAN));
    return NAN;
  }
  if (largest == 0) return 0;
  for_vectors<T>(i, points, depth, [&](int64_t at) { store(rows + at, load<V>(rows + at) / largest); });
  sum = sum_of_squares();
  scale(static_cast<T>(1 / std::sqrt(sum)));
  return std::sqrt(sum) * static_cast<double>(largest);
}

// rows [D, p, panel] -> columns [P, D * panel, panel], zero in the padding.
template <class T>
void transpose(const T* rows, int64_t points, int64_t depth, T* columns) {
  for (int64_t first = 0, block = 0; first < points; first += panel, ++block) {
    const int64_t count = points - first < panel ? points - first : panel;
    for (int64_t d = 0; d < depth; ++d) {
      const T* in = rows + (d * points + first) * panel;
      T* out = columns + (block * depth + d) * panel * panel;
      for (int64_t k = 0; k < panel; ++k) {
        for (int64_t i = 0; i < count; ++i) out[k * panel + i] = in[i * panel + k];
        for (int64_t i = count; i < panel; ++i) out[k * panel + i] = 0;
      }
    }
  }
}

template <class T>
void pack(const PackParams& p, const Executor& executor) {
  const int64_t points = p.shape.points, depth = panels(p.shape.size);
  run_stretches(executor, p.shape.sets, 1, [&](int64_t set, int64_t) {
    T* rows = static_cast<T*>(p.rows) + set * depth * points * panel;
    read_set(p, set, rows);
    for (int64_t i = 0; i < points; ++i) p.lengths[set * points + i] = normalise(rows, i, points, depth);
    if (p.columns != nullptr)
      transpose(rows, points, depth, static_cast<T*>(p.columns) + set * panels(points) * depth * panel * panel);
  });
}

// dx = -(S - u <u, S>) / |x|, and 0 for x = 0.
template <class T>
void unpack(const UnpackParams& p, const Executor& executor) {
  using V = Vec<T>;
  const int64_t points = p.shape.points, size = p.shape.size, depth = panels(size);
  run_stretches(executor, p.shape.sets, 1, [&](int64_t set, int64_t) {
    const T* rows = static_cast<const T*>(p.rows) + set * depth * points * panel;
    const T* sums = static_cast<const T*>(p.sums) + set * depth * points * panel;
    T* grad = static_cast<T*>(p.grad) + set * p.set_stride;
    Buffer<T> along;
    Buffer<double> inverse;
    along.resize(points);
    inverse.resize(points);
    for (int64_t i = 0; i < points; ++i) {
      V sum{};
      for_vectors<T>(i, points, depth, [&](int64_t at) { sum += load<V>(rows + at) * load<V>(sums + at); });
      along[i] = sum_lanes(sum);
      // Finite also for the least length, so that a gradient of 0 stays 0.
      const double length = p.lengths[set * points + i], most = std::numeric_limits<double>::max();
      inverse[i] = length == 0 ? 0 : 1 / length > most ? most : 1 / length;
    }
    const auto write = [&](int64_t i, int64_t k, int64_t at) {
      const T across = rows[at] * along[i] - sums[at];
      grad[i * p.point_stride + k * p.stride] = static_cast<T>(static_cast<double>(across) * inverse[i]);
    };
    for (int64_t block = 0; block < depth; ++block) {
      const int64_t first = block * panel, count = size - first < panel ? size - first : panel;
      if (p.stride == 1) {
        for (int64_t i = 0; i < points; ++i)
          for (int64_t k = 0; k < count; ++k) write(i, first + k, (block * points + i) * panel + k);
      } else {
        for (int64_t k = 0; k < count; ++k)
          for (int64_t i = 0; i < points; ++i) write(i, first + k, (block * points + i) * panel + k);
      }
    }
  });
}

}  // namespace
}  // namespace otface::pairs
