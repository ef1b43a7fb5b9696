// What the products cannot do: classes with very long or short weights, and rows that are aligned with their target. They
// are rare: these kernels mostly find nothing to do. Where there is something, it is done in double, element by element.
#pragma once

#include "margin/cuda_kernels.h"
#include "margin/element.cuh"

namespace otface::margin {

//   product_bj = <x'_b, w_j 2^-exponent_j>
//
// A warp per class, which returns if that is not rescaled; no shared memory.
template <class T>
__global__ void __launch_bounds__(kThreads) multiply_rescaled(const __grid_constant__ RescaledProductsParams p) {
  const int64_t index = simt::block_index() * kRowsPerBlock + warp_index();
  if (index >= p.weight.rows || p.exponents[index] == 0) return;
  const double power = std::ldexp(1.0, -p.exponents[index]);
  for (int64_t b = 0; b < p.x.rows; ++b) {
    double sum = 0;
    for (int64_t j = lane_index(); j < p.x.cols; j += 32)
      sum += load_element(p.x, b, j) * (load_element(p.weight, index, j) * power);
    sum = warp_sum(sum);
    if (lane_index() == 0) static_cast<T*>(p.products)[b * p.row_stride + index] = static_cast<T>(sum);
  }
}

template <class T>
const char* launch_rescaled_products(const RescaledProductsParams& params, simt::Stream stream) {
  return simt::launch(multiply_rescaled<T>, {blocks_of(params.weight.rows), kThreads, 0}, stream, params);
}

//   grad_b = sum_j H_bj w_j 2^-exponent_j over the rescaled classes, or grad_b + that;   H_bj = 0
//
// A warp per row, each lane its columns, and of every 32 classes one, whose H it hands round; no shared memory. Without
// rescaled classes one number is read, and grad is set to zero if nothing is in it yet.
template <class T>
__global__ void __launch_bounds__(kThreads) add_rescaled(const __grid_constant__ RescaledGradientsParams p) {
  const int64_t index = simt::block_index() * kRowsPerBlock + warp_index();
  if (index >= p.batch) return;
  const int64_t size = p.weight.cols, classes = p.weight.rows;
  T* grad = static_cast<T*>(p.grad_x) + index * size;
  if (!p.add)
    for (int64_t i = lane_index(); i < size; i += 32) grad[i] = 0;
  if (*p.any_rescaled == 0) return;
  const Matrix h{p.h, p.product_dtype, p.batch, classes, classes};
  for (int64_t begin = 0; begin < classes; begin += 32) {
    const int64_t mine = begin + lane_index();
    const int exponent = mine < classes ? p.exponents[mine] : 0;
    if (!simt::any_in_warp(exponent != 0)) continue;
    double factor = 0;
    if (exponent != 0) {
      factor = load_element(h, index, mine);
      store_element(p.h, p.product_dtype, index * classes + mine, 0);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int e = simt::shuffle(exponent, lane);
      const double of_class = simt::shuffle(factor, lane), power = std::ldexp(1.0, -e);
      if (e == 0) continue;
      for (int64_t i = lane_index(); i < size; i += 32)
        grad[i] += static_cast<T>(of_class * (load_element(p.weight, begin + lane, i) * power));
    }
  }
}

template <class T>
const char* launch_rescaled_gradients(const RescaledGradientsParams& params, simt::Stream stream) {
  return simt::launch(add_rescaled<T>, {blocks_of(params.batch), kThreads, 0}, stream, params);
}

// The unit vectors of a row and its target, which are aligned.
template <class T>
struct AlignedPair {
  const OwnGradientsParams& p;
  int64_t index, w_row;
  Length length;
  Chord chord;
  double half_square;  // 1 - |c|

  __device__ __forceinline__ AlignedPair(const OwnGradientsParams& p, int64_t index)
      : p(p), index(index), w_row(static_cast<int64_t>(p.rows[index].target) - p.first) {
    const int64_t size = p.x.cols;
    length = length_of<T>(size, [&](int64_t j) { return w(j); });
    chord = {p.rows[index].inverse_norm, length.root, std::ldexp(1.0, -length.exponent), p.rows[index].aligned};
    const double d = length_of_chord(chord, size, [&](int64_t j) { return x(j); }, [&](int64_t j) { return w(j); });
    half_square = d * d / 2;
  }
  __device__ __forceinline__ double x(int64_t j) const { return load_element(p.x, index, j); }
  __device__ __forceinline__ double w(int64_t j) const { return load_element(p.weight, w_row, j); }
  // u_w - c u_x and u_x - c u_w, with c = s (1 - half_square) and s = 1 / s
  __device__ __forceinline__ double tangent_at_x(int64_t j) const {
    return chord.sign * (half_square * chord.of_x(x(j)) - chord.difference(x(j), w(j)));
  }
  __device__ __forceinline__ double tangent_at_w(int64_t j) const {
    return chord.difference(x(j), w(j)) + chord.sign * half_square * chord.of_w(w(j));
  }
};

//   grad x_b += g (u_w - c u_x) / |x_b|
//
// A warp per row, which returns if that is not aligned; no shared memory.
template <class T>
__global__ void __launch_bounds__(kThreads) add_own_of_x(const __grid_constant__ OwnGradientsParams p) {
  const int64_t index = simt::block_index() * kRowsPerBlock + warp_index();
  if (index >= p.x.rows || p.rows[index].aligned == 0) return;
  const AlignedPair<T> pair(p, index);
  const double factor = p.own[index] * p.rows[index].inverse_norm * p.rows[index].power;
  T* grad = static_cast<T*>(p.grad) + index * p.x.cols;
  for (int64_t j = lane_index(); j < p.x.cols; j += 32) grad[j] += static_cast<T>(factor * pair.tangent_at_x(j));
}

template <class T>
const char* launch_own_gradients_of_x(const OwnGradientsParams& params, simt::Stream stream) {
  return simt::launch(add_own_of_x<T>, {blocks_of(params.x.rows), kThreads, 0}, stream, params);
}

// Whether this row adds to the gradient of a class of the chunk.
__device__ __forceinline__ bool adds_to_weight(const OwnGradientsParams& p, int64_t index) {
  const int64_t j = static_cast<int64_t>(p.rows[index].target) - p.first;
  return p.rows[index].aligned != 0 && j >= 0 && j < p.weight.rows;
}

//   grad w_y += g (u_x - c u_w) / |w_y|
//
// A warp per row. Of several rows that are aligned with one class, the first adds up all, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads) add_own_of_weight(const __grid_constant__ OwnGradientsParams p) {
  const int64_t index = simt::block_index() * kRowsPerBlock + warp_index();
  if (index >= p.x.rows || !adds_to_weight(p, index)) return;
  const double target = p.rows[index].target;
  for (int64_t b = 0; b < index; ++b)
    if (p.rows[b].target == target && adds_to_weight(p, b)) return;
  T* grad = static_cast<T*>(p.grad) + (static_cast<int64_t>(target) - p.first) * p.x.cols;
  for (int64_t b = index; b < p.x.rows; ++b) {
    if (p.rows[b].target != target || !adds_to_weight(p, b)) continue;
    const AlignedPair<T> pair(p, b);
    const double factor = std::ldexp(p.own[b] / pair.length.root, -pair.length.exponent);
    for (int64_t j = lane_index(); j < p.x.cols; j += 32) grad[j] += static_cast<T>(factor * pair.tangent_at_w(j));
  }
}

template <class T>
const char* launch_own_gradients_of_weight(const OwnGradientsParams& params, simt::Stream stream) {
  return simt::launch(add_own_of_weight<T>, {blocks_of(params.x.rows), kThreads, 0}, stream, params);
}

}  // namespace otface::margin
