// What the products cannot do: classes with very long or short weights, and rows that are aligned with their target.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// All of it is in double and none of it is fast, because it is rare.
#pragma once

#include <cmath>

#include "common/cpu_run.h"
#include "margin/cpu_start.h"

namespace otface::margin {
namespace {

template <class T>
void rescaled_products(const RescaledProductsParams& p, const Executor& executor) {
  run_stretches(executor, p.weight.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      if (p.exponents[j] == 0) continue;
      const T* w = static_cast<const T*>(p.weight.data) + j * p.weight.row_stride;
      const double power = std::ldexp(1.0, -p.exponents[j]);
      for (int64_t b = 0; b < p.x.rows; ++b) {
        const T* x = static_cast<const T*>(p.x.data) + b * p.x.row_stride;
        double sum = 0;
        for (int64_t i = 0; i < p.x.cols; ++i) sum += static_cast<double>(x[i]) * (static_cast<double>(w[i]) * power);
        static_cast<T*>(p.products)[b * p.row_stride + j] = static_cast<T>(sum);
      }
    }
  });
}

// Whether grad_x has something in it now.
template <class T>
bool rescaled_gradients(const RescaledGradientsParams& p, const Executor& executor) {
  if (*p.any_rescaled == 0) return p.add;
  const int64_t classes = p.weight.rows, size = p.weight.cols;
  run_stretches(executor, p.batch, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      T* h = static_cast<T*>(p.h) + b * classes;
      T* grad = static_cast<T*>(p.grad_x) + b * size;
      if (!p.add)
        for (int64_t i = 0; i < size; ++i) grad[i] = 0;
      for (int64_t j = 0; j < classes; ++j) {
        if (p.exponents[j] == 0) continue;
        const T* w = static_cast<const T*>(p.weight.data) + j * p.weight.row_stride;
        const double factor = static_cast<double>(h[j]), power = std::ldexp(1.0, -p.exponents[j]);
        for (int64_t i = 0; i < size; ++i) grad[i] += static_cast<T>(factor * (static_cast<double>(w[i]) * power));
        h[j] = 0;
      }
    }
  });
  return true;
}

// The unit vectors of an aligned row and its target: both, their difference, and what the target's length is.
template <class T>
struct AlignedPair {
  const OwnGradientsParams& p;
  const Row& row;
  const T* x;
  int64_t w_row;
  Length length;
  double shrink, half_square;  // 1 - |cos| = |difference|^2 / 2

  AlignedPair(const OwnGradientsParams& p, int64_t b)
      : p(p),
        row(p.rows[b]),
        x(static_cast<const T*>(p.x.data) + b * p.x.row_stride),
        w_row((static_cast<int64_t>(row.target) - p.first) * p.weight.row_stride),
        length(length_of(p.x.cols, [&](int64_t i) { return element(p.weight.data, p.weight.dtype, w_row + i); })),
        shrink(std::ldexp(1.0, -length.exponent)) {
    const double chord = chord_of(p.x.cols, x, row.inverse_norm, [&](int64_t i) { return of_w(i); }, row.aligned);
    half_square = chord * chord / 2;
  }
  double of_x(int64_t i) const { return static_cast<double>(x[i]) * row.inverse_norm; }
  double of_w(int64_t i) const { return (element(p.weight.data, p.weight.dtype, w_row + i) * shrink) / length.root; }
  // u_w - c u_x and u_x - c u_w, from u_x - s u_w with the sign s of c: c = s (1 - |u_x - s u_w|^2 / 2)
  double tangent_at_x(int64_t i) const {
    return row.aligned * (half_square * of_x(i) - (of_x(i) - row.aligned * of_w(i)));
  }
  double tangent_at_w(int64_t i) const { return of_x(i) - row.aligned * of_w(i) + row.aligned * half_square * of_w(i); }
};

template <class T>
void own_gradients_of_x(const OwnGradientsParams& p, const Executor&) {
  for (int64_t b = 0; b < p.x.rows; ++b) {
    if (p.rows[b].aligned == 0) continue;
    const AlignedPair<T> pair(p, b);
    const double factor = p.own[b] * pair.row.inverse_norm * pair.row.power;
    T* grad = static_cast<T*>(p.grad) + b * p.x.cols;
    for (int64_t i = 0; i < p.x.cols; ++i) grad[i] += static_cast<T>(factor * pair.tangent_at_x(i));
  }
}

// Row by row, so that what several add to one class comes in their order.
template <class T>
void own_gradients_of_weight(const OwnGradientsParams& p, const Executor&) {
  for (int64_t b = 0; b < p.x.rows; ++b) {
    const int64_t j = static_cast<int64_t>(p.rows[b].target) - p.first;
    if (p.rows[b].aligned == 0 || j < 0 || j >= p.weight.rows) continue;
    const AlignedPair<T> pair(p, b);
    const double factor = std::ldexp(p.own[b] / pair.length.root, -pair.length.exponent);
    T* grad = static_cast<T*>(p.grad) + j * p.x.cols;
    for (int64_t i = 0; i < p.x.cols; ++i) grad[i] += static_cast<T>(factor * pair.tangent_at_w(i));
  }
}

}  // namespace
}  // namespace otface::margin
