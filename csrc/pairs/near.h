// Entries of a cost matrix whose two points are near: plain structs of raw pointers, and what counts as near. The same
// for every device.
//
// The cost of x and y comes from a matrix product:
//
//   cosine       1 - <x, y>                    x and y of unit length, or 0; s = 1
//   sqeuclidean  s - 2 <x - c, y - c>          s = |x - c|^2 + |y - c|^2, about any centre c
//   euclidean    its root
//
// In "Real" (double for double points, else float) with rounding unit u the product is wrong by some u sqrt(d) s, which is
// everything where x and y are near. There the cost is computed again, from differences: |x - y|^2 has a relative error
// of a few u, is never negative, and is 0 for equal points. Near is what is at most near_share s: more than that has a
// relative error of 2^12 u at most, and keeps the bits of the product. It is also what no product can compute: where a
// square leaves the range of Real, and where something is not finite, so that NaN stays in its row or column.
//
// The gradient is that of the product, G_ij (x_i - y_j) = G_ij x_i - G_ij y_j, only where the points are not near.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define OTFACE_HOST_DEVICE __host__ __device__
#else
#define OTFACE_HOST_DEVICE
#endif

namespace otface::pairs {

enum class Metric : int32_t { cosine, sqeuclidean, euclidean };

struct CostShape {
  bool is_double;  // Real
  Metric metric;
  int64_t batch, rows, cols, size;  // B, n, m, d
};

// Everything contiguous and Real.
struct PointSets {
  const void* x;          // [B, n, d]
  const void* y;          // [B, m, d]
  const void* x_squares;  // [B, n]: |x - c|^2; null for the cosine
  const void* y_squares;  // [B, m]
};

struct NearCostsParams {
  CostShape shape;
  PointSets points;
  void* cost;  // [B, n, m] as the product gave it; near entries are replaced
};

// What G_ij (x_i - y_j) is multiplied by in the product, without its factor 2: the gradient G of |x - y|^2, G / (2 |x - y|)
// of |x - y|; 0 for near entries.
struct FarWeightsParams {
  CostShape shape;  // not of the cosine
  PointSets points;
  const void* cost;  // [B, n, m]
  const void* grad;  // [B, n, m]
  void* weights;     // [B, n, m]
};

// The gradients of x and y: those of the product, to which the near entries are added, in the order of the other points.
// Points that coincide, and entries with G = 0, add nothing.
struct NearGradientParams {
  CostShape shape;  // not of the cosine
  PointSets points;
  const void* cost;   // [B, n, m]
  const void* grad;   // [B, n, m]
  const void* far_x;  // [B, n, d]
  const void* far_y;  // [B, m, d]
  void* grad_x;       // [B, n, d]
  void* grad_y;       // [B, m, d]
};

// A square below this, or a sum of squares, may have lost digits that were too small for Real.
template <class T>
inline constexpr T least_square = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();

namespace {

template <Metric metric>
using MetricConstant = std::integral_constant<Metric, metric>;

// f(the metric as a constant)
template <class F>
auto with_distance(Metric metric, const F& f) {
  return metric == Metric::sqeuclidean ? f(MetricConstant<Metric::sqeuclidean>())
                                       : f(MetricConstant<Metric::euclidean>());
}
template <class F>
auto with_metric(Metric metric, const F& f) {
  return metric == Metric::cosine ? f(MetricConstant<Metric::cosine>()) : with_distance(metric, f);
}

// The product is wrong by less than 4 (sqrt(d) + 4) u s: the roundings of d products and sums are independent enough for
// their sum to grow like the root of their number. What is not near has then a relative error of 2^12 u at most. And a
// product of TensorFloat32 or bfloat16, wrong by 2^-8 s at most, still takes points that coincide for near ones.
inline double near_share(int64_t size) { return (std::sqrt(static_cast<double>(size)) + 4) / 1024; }

// Whether a cost as the product gave it keeps its bits. V: Real, or a vector of them; false where something is NaN.
template <Metric metric, class T, class V>
OTFACE_HOST_DEVICE inline auto is_far(V cost, V s, T share) {
  const V square = metric == Metric::euclidean ? cost * cost : cost;
  return (square > s * share) & (square > least_square<T>);
}

template <Metric metric, class T>
OTFACE_HOST_DEVICE inline T cost_of_root(T root) {
  return metric == Metric::euclidean ? root : metric == Metric::sqeuclidean ? root * root : root * root / 2;
}
template <Metric metric, class T>
OTFACE_HOST_DEVICE inline T cost_of_square(T square) {
  return metric == Metric::euclidean ? std::sqrt(square) : metric == Metric::sqeuclidean ? square : square / 2;
}

}  // namespace
}  // namespace otface::pairs
