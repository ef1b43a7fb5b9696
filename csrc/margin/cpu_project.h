// The gradient of a row through its length: dv = factor (g - v^ <v^, g>) with v^ = v / |v|.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// A row is read from memory once (the second time it is in the first-level cache) and written once.
#pragma once

#include <cmath>
#include <limits>

#include "common/cpu_run.h"
#include "common/vec.h"
#include "margin/row.h"

namespace otface::margin {
namespace {

template <class T>
OTFACE_INLINE T dot(const T* a, const T* b, int64_t size) {
  using V = Vec<T>;
  constexpr int64_t W = lanes<T>;
  V sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= size; i += 4 * W)
    for (int k = 0; k < 4; ++k) sum[k] += load<V>(a + i + k * W) * load<V>(b + i + k * W);
  for (; i + W <= size; i += W) sum[0] += load<V>(a + i) * load<V>(b + i);
  const Four<T> sums = sum_lanes(sum[0], sum[1], sum[2], sum[3]);
  T result = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  for (; i < size; ++i) result += a[i] * b[i];
  return result;
}

// Of v times a power of two, and by a factor, that T may not hold.
template <class T>
void project_in_double(const T* v, const T* g, T* out, int64_t size, double inverse_norm, double of_v, double factor) {
  double share = 0;
  for (int64_t i = 0; i < size; ++i)
    share += static_cast<double>(v[i]) * of_v * inverse_norm * static_cast<double>(g[i]);
  for (int64_t i = 0; i < size; ++i)
    out[i] =
        static_cast<T>((static_cast<double>(g[i]) - static_cast<double>(v[i]) * of_v * inverse_norm * share) * factor);
}

template <class T>
void project(const ProjectParams& p, const Executor& executor) {
  using V = Vec<T>;
  constexpr int64_t W = lanes<T>;
  run_stretches(executor, p.count, p.rows == nullptr ? 64 : 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* v = static_cast<const T*>(p.v.data) + r * p.v.row_stride;
      const T* g = static_cast<const T*>(p.grad) + r * p.size;
      T* out = static_cast<T*>(p.out) + r * p.size;
      const T inverse_norm =
          p.rows == nullptr ? static_cast<const T*>(p.inverse_norms)[r] : static_cast<T>(p.rows[r].inverse_norm);
      const int exponent = p.exponents == nullptr ? 0 : p.exponents[r];
      const double power = p.rows == nullptr ? std::ldexp(1.0, -exponent) : p.rows[r].power;
      const T factor = static_cast<T>(power);
      if (exponent != 0 || factor == std::numeric_limits<T>::infinity()) {
        project_in_double(v, g, out, p.size, static_cast<double>(inverse_norm), std::ldexp(1.0, -exponent), power);
        continue;
      }
      // v^ and <v^, g> one by one: |v|^2 may leave the range of T.
      const T share = dot(v, g, p.size) * inverse_norm;
      int64_t i = 0;
      for (; i + W <= p.size; i += W) store(out + i, (load<V>(g + i) - load<V>(v + i) * inverse_norm * share) * factor);
      for (; i < p.size; ++i) out[i] = (g[i] - v[i] * inverse_norm * share) * factor;
    }
  });
}

}  // namespace
}  // namespace otface::margin
