// Between points as users hold them and the order that the products read: unit length in, and its gradient out.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// A task is one set, which fits in the second-level cache: it is read once and written once in each order.
#pragma once

#include <cmath>
#include <limits>

#include "common/cpu_buffer.h"
#include "common/cpu_half.h"
#include "common/cpu_run.h"
#include "pairs/cpu_tile.h"

namespace otface::pairs {
namespace {

// out[c][r] = in[r][c], in blocks of four by four.
template <class T>
void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t cols, T* out, int64_t out_stride) {
  const int64_t whole_rows = rows / 4 * 4, whole_cols = cols / 4 * 4;
  for (int64_t c = 0; c < whole_cols; c += 4) {
    for (int64_t r = 0; r < whole_rows; r += 4) {
      const T* from = in + r * in_stride + c;
      const Four<T> x0 = load<Four<T>>(from), x1 = load<Four<T>>(from + in_stride),
                    x2 = load<Four<T>>(from + 2 * in_stride), x3 = load<Four<T>>(from + 3 * in_stride);
      const Four<T> a = OTFACE_SHUFFLE(x0, x1, 0, 4, 1, 5), b = OTFACE_SHUFFLE(x0, x1, 2, 6, 3, 7);
      const Four<T> d = OTFACE_SHUFFLE(x2, x3, 0, 4, 1, 5), e = OTFACE_SHUFFLE(x2, x3, 2, 6, 3, 7);
      T* to = out + c * out_stride + r;
      store(to, OTFACE_SHUFFLE(a, d, 0, 1, 4, 5));
      store(to + out_stride, OTFACE_SHUFFLE(a, d, 2, 3, 6, 7));
      store(to + 2 * out_stride, OTFACE_SHUFFLE(b, e, 0, 1, 4, 5));
      store(to + 3 * out_stride, OTFACE_SHUFFLE(b, e, 2, 3, 6, 7));
    }
    for (int64_t r = whole_rows; r < rows; ++r)
      for (int64_t k = c; k < c + 4; ++k) out[k * out_stride + r] = in[r * in_stride + k];
  }
  for (int64_t c = whole_cols; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) out[c * out_stride + r] = in[r * in_stride + c];
}

// f(block, first, how many there are) for the panels of so many dimensions or points.
template <class F>
OTFACE_INLINE void for_panels(int64_t size, const F& f) {
  for (int64_t block = 0; block < panels(size); ++block) {
    const int64_t first = block * panel;
    f(block, first, size - first < panel ? size - first : panel);
  }
}

// x [p, d] -> rows [D, p, panel], zero in the padding.
template <class T, class S, class Convert>
void copy_to_rows(const S* x, int64_t point_stride, int64_t stride, int64_t points, int64_t size, T* rows,
                  const Convert& convert) {
  if (size == 0)
    for (int64_t i = 0; i < points * panel; ++i) rows[i] = 0;
  for_panels(size, [&](int64_t block, int64_t first, int64_t count) {
    const S* in = x + first * stride;
    T* out = rows + block * points * panel;
    if (count < panel)
      for (int64_t i = 0; i < points * panel; ++i) out[i] = 0;
    if constexpr (sizeof(S) == sizeof(T)) {
      if (point_stride == 1) return transpose(in, stride, count, points, out, panel);
    }
    for (int64_t i = 0; i < points; ++i)
      for (int64_t k = 0; k < count; ++k)
        out[i * panel + k] = static_cast<T>(convert(in[i * point_stride + k * stride]));
  });
}

template <class T>
void read_set(const PackParams& p, int64_t set, T* rows) {
  const PointsView& x = p.points;
  const auto copy = [&](const auto* data, auto convert) {
    copy_to_rows(data + set * x.set_stride, x.point_stride, x.stride, p.shape.points, p.shape.size, rows, convert);
  };
  switch (x.dtype) {
    case DType::float32: return copy(static_cast<const float*>(x.data), [](float v) { return v; });
    case DType::float64: return copy(static_cast<const double*>(x.data), [](double v) { return v; });
    case DType::float16: return copy(static_cast<const uint16_t*>(x.data), half_to_float);
    case DType::bfloat16: return copy(static_cast<const uint16_t*>(x.data), bfloat_to_float);
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
void copy_to_columns(const T* rows, int64_t points, int64_t depth, T* columns) {
  for_panels(points, [&](int64_t block, int64_t first, int64_t count) {
    for (int64_t d = 0; d < depth; ++d) {
      T* out = columns + (block * depth + d) * panel * panel;
      if (count < panel)
        for (int64_t i = 0; i < panel * panel; ++i) out[i] = 0;
      transpose(rows + (d * points + first) * panel, panel, count, panel, out, panel);
    }
  });
}

template <class T>
void pack(const PackParams& p, const Executor& executor) {
  const int64_t points = p.shape.points, depth = depth_of(p.shape.size);
  run_in_turn(executor, p.shape.sets, [&](const auto& next) {
    for (int64_t set = next(); set >= 0; set = next()) {
      T* rows = static_cast<T*>(p.rows) + set * depth * points * panel;
      read_set(p, set, rows);
      for (int64_t i = 0; i < points; ++i) p.lengths[set * points + i] = normalise(rows, i, points, depth);
      if (p.columns == nullptr) continue;
      copy_to_columns(rows, points, depth, static_cast<T*>(p.columns) + set * panels(points) * depth * panel * panel);
    }
  });
}

// dx = -(S - u <u, S>) / |x|, and 0 for x = 0.
template <class T>
class Unpacker {
 public:
  explicit Unpacker(const UnpackParams& params) : p_(params), points_(params.shape.points) {
    along_.resize(points_);
    inverse_.resize(points_);
    beyond_.resize(points_);
    panel_.resize(points_ * panel);
  }

  void unpack(int64_t set) {
    const int64_t depth = depth_of(p_.shape.size);
    const T* rows = static_cast<const T*>(p_.rows) + set * depth * points_ * panel;
    const T* sums = static_cast<const T*>(p_.sums) + set * depth * points_ * panel;
    T* grad = static_cast<T*>(p_.grad) + set * p_.set_stride;
    for (int64_t i = 0; i < points_; ++i) prepare(i, rows, sums, p_.lengths[set * points_ + i], depth);
    for_panels(p_.shape.size, [&](int64_t block, int64_t first, int64_t count) {
      for (int64_t i = 0; i < points_; ++i) {
        const int64_t at = (block * points_ + i) * panel;
        for (int64_t k = 0; k < panel; k += lanes<T>) {
          const Vec<T> across = load<Vec<T>>(rows + at + k) * along_[i] - load<Vec<T>>(sums + at + k);
          store(panel_ + i * panel + k, across * inverse_[i] * beyond_[i]);
        }
      }
      T* out = grad + first * p_.stride;
      if (p_.point_stride == 1) return transpose<T>(panel_, panel, points_, count, out, p_.stride);
      for (int64_t i = 0; i < points_; ++i)
        for (int64_t k = 0; k < count; ++k) out[i * p_.point_stride + k * p_.stride] = panel_[i * panel + k];
    });
  }

 private:
  // <u, S> of a point, and 1 / |x| as a product of two numbers that are finite also for the least length, so that a
  // gradient of 0 stays 0. (The inverse of a double that is not normal is cut off at the largest number.)
  void prepare(int64_t i, const T* rows, const T* sums, double length, int64_t depth) {
    Vec<T> sum{};
    for_vectors<T>(i, points_, depth, [&](int64_t at) { sum += load<Vec<T>>(rows + at) * load<Vec<T>>(sums + at); });
    along_[i] = sum_lanes(sum);
    const double largest = std::numeric_limits<double>::max(),
                 most = static_cast<double>(std::numeric_limits<T>::max());
    const double inverse = length == 0 ? 0 : 1 / length > largest ? largest : 1 / length;
    inverse_[i] = static_cast<T>(inverse > most ? most : inverse);
    beyond_[i] = static_cast<T>(inverse > most ? inverse / most : 1);
  }

  const UnpackParams& p_;
  int64_t points_;
  Buffer<T> along_, inverse_, beyond_;  // [p]
  Buffer<T> panel_;                     // [p, panel]: some dimensions of the gradient
};

template <class T>
void unpack(const UnpackParams& p, const Executor& executor) {
  run_in_turn(executor, p.shape.sets, [&](const auto& next) {
    Unpacker<T> unpacker(p);
    for (int64_t set = next(); set >= 0; set = next()) unpacker.unpack(set);
  });
}

}  // namespace
}  // namespace otface::pairs
