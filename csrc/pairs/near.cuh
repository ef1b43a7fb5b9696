// The near entries of cost matrices that come from a library's product, and their share of the gradient: see near.h.
//
// A warp looks at 32 costs at a time. For each near one among them, all its lanes go over the coordinates of the two
// points. Nearness is rare, so that a pass is what reading the costs takes; no shared memory.
#pragma once

#include "common/simt.h"
#include "pairs/cuda_kernels.h"
#include "pairs/near.h"

namespace otface::pairs {

constexpr int kThreads = 256, kWarpsPerBlock = kThreads / 32;
constexpr int64_t kColumns = 1024;  // of a warp
constexpr int kPerLane = 4;         // coordinates

inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline simt::LaunchShape launch_shape(int64_t warps) { return {parts_of(warps, kWarpsPerBlock), kThreads, 0}; }

__device__ __forceinline__ int lane_index() { return simt::thread_index() % 32; }
__device__ __forceinline__ int64_t warp_of_grid() {
  return simt::block_index() * kWarpsPerBlock + simt::thread_index() / 32;
}

// Each lane gets the same bits: at every level both partners add the same two numbers.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) x += simt::shuffle_xor(x, bit);
  return x;
}
// NaN if there is one.
template <class T>
__device__ __forceinline__ T warp_most(T x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    const T other = simt::shuffle_xor(x, bit);
    x = x > other || x != x ? x : other;
  }
  return x;
}

// The cost of two points from their differences, all lanes together.
template <Metric metric, class T>
__device__ __forceinline__ T cost_of_points(const T* x, const T* y, int64_t size) {
  const int lane = lane_index();
  T sum = 0;
  for (int64_t k = lane; k < size; k += 32) sum += (x[k] - y[k]) * (x[k] - y[k]);
  sum = warp_sum(sum);
  constexpr T most = std::numeric_limits<T>::max();
  if (sum > least_square<T> && sum <= most) return cost_of_square<metric>(sum);
  // The squares of the differences over the largest one stay in the range of T.
  T largest = 0;
  for (int64_t k = lane; k < size; k += 32) {
    const T difference = std::fabs(x[k] - y[k]);
    largest = largest > difference || largest != largest ? largest : difference;
  }
  largest = warp_most(largest);
  if (!(largest > 0 && largest <= most)) return cost_of_root<metric>(largest);
  sum = 0;
  for (int64_t k = lane; k < size; k += 32) {
    const T difference = (x[k] - y[k]) / largest;
    sum += difference * difference;
  }
  return cost_of_root<metric>(largest * std::sqrt(warp_sum(sum)));
}

// f(k) with all lanes together for each lane k where `wanted`.
template <class F>
__device__ __forceinline__ void for_lanes(bool wanted, const F& f) {
  const unsigned lanes = simt::ballot(wanted);
  if (lanes == 0) return;
  for (int k = 0; k < 32; ++k)
    if ((lanes >> k & 1) != 0) f(k);
}

// The part of a row of costs that a warp works on.
struct Part {
  int64_t row;         // of all problems together
  int64_t begin, end;  // columns; none where there is no such row

  __device__ __forceinline__ static Part of(const CostShape& shape) {
    const int64_t rows = shape.batch * shape.rows, row = warp_of_grid() % rows;
    const int64_t begin = warp_of_grid() / rows * kColumns, end = begin + kColumns;
    return {row, begin, end < shape.cols ? end : shape.cols};
  }
};

inline simt::LaunchShape shape_of_parts(const CostShape& shape) {
  return launch_shape(shape.batch * shape.rows * parts_of(shape.cols, kColumns));
}

// s of near.h
template <Metric metric, class T>
__device__ __forceinline__ T s_of(const void* squares, int64_t at, const void* other_squares, int64_t other_at) {
  if constexpr (metric == Metric::cosine) return 1;
  return static_cast<const T*>(squares)[at] + static_cast<const T*>(other_squares)[other_at];
}

// A warp per row and kColumns columns.
template <class T, Metric metric>
__global__ void __launch_bounds__(kThreads) replace_near(const __grid_constant__ NearCostsParams p, T share) {
  const Part part = Part::of(p.shape);
  const int64_t size = p.shape.size, first_of_y = part.row / p.shape.rows * p.shape.cols;
  T* cost = static_cast<T*>(p.cost) + part.row * p.shape.cols;
  const T* x = static_cast<const T*>(p.points.x) + part.row * size;
  const T* y = static_cast<const T*>(p.points.y) + first_of_y * size;
  for (int64_t begin = part.begin; begin < part.end; begin += 32) {
    const int64_t j = begin + lane_index();
    const bool near =
        j < part.end &&
        !is_far<metric>(cost[j], s_of<metric, T>(p.points.x_squares, part.row, p.points.y_squares, first_of_y + j),
                        share);
    for_lanes(near, [&](int k) {
      const T value = cost_of_points<metric>(x, y + (begin + k) * size, size);
      if (lane_index() == k) cost[j] = value;
    });
  }
}

// As above.
template <class T, Metric metric>
__global__ void __launch_bounds__(kThreads) write_far_weights(const __grid_constant__ FarWeightsParams p, T share) {
  const Part part = Part::of(p.shape);
  const int64_t first = part.row * p.shape.cols, first_of_y = part.row / p.shape.rows * p.shape.cols;
  const T *cost = static_cast<const T*>(p.cost) + first, *grad = static_cast<const T*>(p.grad) + first;
  T* weights = static_cast<T*>(p.weights) + first;
  for (int64_t j = part.begin + lane_index(); j < part.end; j += 32) {
    const T s = s_of<metric, T>(p.points.x_squares, part.row, p.points.y_squares, first_of_y + j);
    const T weight = metric == Metric::euclidean ? grad[j] / (2 * cost[j]) : grad[j];
    weights[j] = is_far<metric>(cost[j], s, share) ? weight : 0;
  }
}

// The points of one side, each with all of the other.
struct Side {
  const void *points, *squares;              // [B, count, d], [B, count]
  const void *other_points, *other_squares;  // [B, other_count, d], [B, other_count]
  const void* far;                           // [B, count, d]
  void* grad;                                // [B, count, d]
  int64_t count, other_count;
  int64_t stride, other_stride;  // of the costs from point to point

  static Side of_x(const NearGradientParams& p) {
    return {p.points.x, p.points.x_squares, p.points.y,   p.points.y_squares, p.far_x,
            p.grad_x,   p.shape.rows,       p.shape.cols, p.shape.cols,       1};
  }
  static Side of_y(const NearGradientParams& p) {
    return {p.points.y,   p.points.y_squares, p.points.x, p.points.x_squares, p.far_y, p.grad_y,
            p.shape.cols, p.shape.rows,       1,          p.shape.cols};
  }
};

// A warp per point of a side and 32 kPerLane of its coordinates.
template <class T, Metric metric>
__global__ void __launch_bounds__(kThreads)
    add_near_gradient(const __grid_constant__ NearGradientParams p, const __grid_constant__ Side side, T share) {
  const int64_t size = p.shape.size, points = p.shape.batch * side.count, point = warp_of_grid() % points;
  const int64_t first = warp_of_grid() / points * (32 * kPerLane) + lane_index();
  if (first - lane_index() >= size) return;  // all lanes of a warp
  const int64_t b = point / side.count, first_other = b * side.other_count;
  const int64_t costs = b * p.shape.rows * p.shape.cols + point % side.count * side.stride;
  T at_point[kPerLane], sum[kPerLane];
#pragma unroll
  for (int q = 0; q < kPerLane; ++q) {
    const bool exists = first + q * 32 < size;
    at_point[q] = exists ? static_cast<const T*>(side.points)[point * size + first + q * 32] : 0;
    sum[q] = exists ? static_cast<const T*>(side.far)[point * size + first + q * 32] : 0;
  }
  for (int64_t begin = 0; begin < side.other_count; begin += 32) {
    const int64_t j = begin + lane_index();
    T cost = 0, grad = 0;
    if (j < side.other_count) {
      cost = static_cast<const T*>(p.cost)[costs + j * side.other_stride];
      const T s = s_of<metric, T>(side.squares, point, side.other_squares, first_other + j);
      if (!is_far<metric>(cost, s, share)) grad = static_cast<const T*>(p.grad)[costs + j * side.other_stride];
    }
    for_lanes(grad != 0 && cost != 0, [&](int k) {
      const T cost_k = simt::shuffle(cost, k), grad_k = simt::shuffle(grad, k);
      const T* other = static_cast<const T*>(side.other_points) + (first_other + begin + k) * size;
#pragma unroll
      for (int q = 0; q < kPerLane; ++q) {
        if (first + q * 32 >= size) continue;
        const T difference = at_point[q] - other[first + q * 32];
        sum[q] += metric == Metric::euclidean ? difference / cost_k * grad_k : difference * (2 * grad_k);
      }
    });
  }
#pragma unroll
  for (int q = 0; q < kPerLane; ++q)
    if (first + q * 32 < size) static_cast<T*>(side.grad)[point * size + first + q * 32] = sum[q];
}

template <class T>
T share_of(const CostShape& shape) {
  return static_cast<T>(near_share(shape.size));
}

template <class T>
const char* launch_near_costs(const NearCostsParams& params, simt::Stream stream) {
  return with_metric(params.shape.metric, [&](auto metric) {
    return simt::launch(replace_near<T, metric>, shape_of_parts(params.shape), stream, params,
                        share_of<T>(params.shape));
  });
}

template <class T>
const char* launch_far_weights(const FarWeightsParams& params, simt::Stream stream) {
  return with_distance(params.shape.metric, [&](auto metric) {
    return simt::launch(write_far_weights<T, metric>, shape_of_parts(params.shape), stream, params,
                        share_of<T>(params.shape));
  });
}

template <class T>
const char* launch_near_gradient(const NearGradientParams& params, simt::Stream stream) {
  return with_distance(params.shape.metric, [&](auto metric) {
    for (const Side& side : {Side::of_x(params), Side::of_y(params)}) {
      const int64_t warps = params.shape.batch * side.count * parts_of(params.shape.size, 32 * kPerLane);
      const char* error = simt::launch(add_near_gradient<T, metric>, launch_shape(warps), stream, params, side,
                                       share_of<T>(params.shape));
      if (*error != 0) return error;
    }
    return "";
  });
}

}  // namespace otface::pairs
