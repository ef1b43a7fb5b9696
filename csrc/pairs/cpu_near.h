// The near entries of cost matrices that come from a library's product, and their share of the gradient: see near.h.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// A pass over the costs; where two points are near, also over their coordinates.
#pragma once

#include "common/cpu_run.h"
#include "pairs/cpu_difference.h"

namespace otface::pairs {
namespace {

template <class T, Metric metric>
class NearEntries {
 public:
  NearEntries(const CostShape& shape, const PointSets& points)
      : shape_(shape), points_(points), share_(static_cast<T>(near_share(shape.size))) {}

  // f(j) for the near entries begin <= j < end of row i of problem b.
  template <class F>
  OTFACE_INLINE void in_row(const void* cost, int64_t b, int64_t i, int64_t begin, int64_t end, const F& f) const {
    const int64_t row = b * shape_.rows + i;
    const T* costs = static_cast<const T*>(cost) + row * shape_.cols;
    if constexpr (metric == Metric::cosine) {
      for_near<metric>(costs, begin, end, share_, [](auto zero, int64_t) { return zero + T(1); }, f);
    } else {
      const T x_square = static_cast<const T*>(points_.x_squares)[row];
      const T* y_squares = static_cast<const T*>(points_.y_squares) + b * shape_.cols;
      const auto s_of = [&](auto zero, int64_t j) { return load<decltype(zero)>(y_squares + j) + x_square; };
      for_near<metric>(costs, begin, end, share_, s_of, f);
    }
  }
  TwoPoints<T> points(int64_t b, int64_t i, int64_t j) const {
    return {static_cast<const T*>(points_.x) + (b * shape_.rows + i) * shape_.size,
            static_cast<const T*>(points_.y) + (b * shape_.cols + j) * shape_.size, shape_.size, panel};
  }

 private:
  const CostShape& shape_;
  const PointSets& points_;
  T share_;
};

template <class T>
OTFACE_INLINE void copy(const T* from, int64_t count, T* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}

// f(b, i) for all rows of all problems.
template <class F>
void for_rows(const CostShape& shape, const Executor& executor, const F& f) {
  constexpr int64_t entries = 16384;  // of a task, or one row
  const int64_t grain = shape.cols > 0 && shape.cols < entries ? entries / shape.cols : 1;
  run_stretches(executor, shape.batch * shape.rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row / shape.rows, row % shape.rows);
  });
}

template <class T>
void near_costs(const NearCostsParams& p, const Executor& executor) {
  with_metric(p.shape.metric, [&](auto metric) {
    const NearEntries<T, metric> near(p.shape, p.points);
    for_rows(p.shape, executor, [&](int64_t b, int64_t i) {
      T* cost = static_cast<T*>(p.cost) + (b * p.shape.rows + i) * p.shape.cols;
      near.in_row(p.cost, b, i, 0, p.shape.cols,
                  [&](int64_t j) { cost[j] = near.points(b, i, j).template cost<metric>(); });
    });
  });
}

template <class T>
void far_weights(const FarWeightsParams& p, const Executor& executor) {
  with_distance(p.shape.metric, [&](auto metric) {
    const NearEntries<T, metric> near(p.shape, p.points);
    const int64_t cols = p.shape.cols;
    for_rows(p.shape, executor, [&](int64_t b, int64_t i) {
      const int64_t first = (b * p.shape.rows + i) * cols;
      const T *cost = static_cast<const T*>(p.cost) + first, *grad = static_cast<const T*>(p.grad) + first;
      T* weights = static_cast<T*>(p.weights) + first;
      for (int64_t j = 0; j < cols; ++j) weights[j] = metric == Metric::euclidean ? grad[j] / (2 * cost[j]) : grad[j];
      near.in_row(p.cost, b, i, 0, cols, [&](int64_t j) { weights[j] = 0; });
    });
  });
}

template <class T, Metric metric>
class NearGradient {
 public:
  explicit NearGradient(const NearGradientParams& params) : p_(params), near_(params.shape, params.points) {}

  // A task is some points of one side with all points of the other, so that tasks write to different places.
  void of_x(int64_t b, int64_t i) const {
    const int64_t row = b * p_.shape.rows + i, size = p_.shape.size;
    T* grad = static_cast<T*>(p_.grad_x) + row * size;
    copy(static_cast<const T*>(p_.far_x) + row * size, size, grad);
    near_.in_row(p_.cost, b, i, 0, p_.shape.cols, [&](int64_t j) { add(b, i, j, T(1), grad); });
  }
  void of_y(int64_t b, int64_t begin, int64_t end) const {
    const int64_t size = p_.shape.size, first = (b * p_.shape.cols + begin) * size;
    T* grad = static_cast<T*>(p_.grad_y) + first;
    copy(static_cast<const T*>(p_.far_y) + first, (end - begin) * size, grad);
    for (int64_t i = 0; i < p_.shape.rows; ++i)
      near_.in_row(p_.cost, b, i, begin, end, [&](int64_t j) { add(b, i, j, T(-1), grad + (j - begin) * size); });
  }

 private:
  // to += sign * G d cost / dx
  OTFACE_INLINE void add(int64_t b, int64_t i, int64_t j, T sign, T* to) const {
    const int64_t at = (b * p_.shape.rows + i) * p_.shape.cols + j;
    const T grad = sign * static_cast<const T*>(p_.grad)[at], cost = static_cast<const T*>(p_.cost)[at];
    if (grad == 0 || cost == 0) return;
    near_.points(b, i, j).for_differences([&](auto difference, int64_t k) {
      const auto gradient = metric == Metric::euclidean ? difference / cost * grad : difference * (2 * grad);
      store(to + k, load<decltype(difference)>(to + k) + gradient);
    });
  }

  const NearGradientParams& p_;
  NearEntries<T, metric> near_;
};

template <class T>
void near_gradient(const NearGradientParams& p, const Executor& executor) {
  with_distance(p.shape.metric, [&](auto metric) {
    const NearGradient<T, metric> near(p);
    for_rows(p.shape, executor, [&](int64_t b, int64_t i) { near.of_x(b, i); });
    constexpr int64_t stripe = 64;  // points of y of a task
    const int64_t stripes = (p.shape.cols + stripe - 1) / stripe;
    run_stretches(executor, p.shape.batch * stripes, 1, [&](int64_t task, int64_t) {
      const int64_t begin = task % stripes * stripe, past = begin + stripe;
      near.of_y(task / stripes, begin, past < p.shape.cols ? past : p.shape.cols);
    });
  });
}

}  // namespace
}  // namespace otface::pairs
