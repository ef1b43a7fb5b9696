// The gradient of a row through its length: dv = factor (g - v^ <v^, g>) with v^ = v / |v|.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// A row is read from memory once (the second time it is in the first-level cache) and written once.
#pragma once

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
      // v^ and <v^, g> one by one: |v|^2 may leave the range of T.
      const T share = dot(v, g, p.size) * inverse_norm;
      const double power = p.rows == nullptr ? 1 : p.rows[r].power;
      const T factor = static_cast<T>(power);
      int64_t i = 0;
      for (; i + W <= p.size; i += W) store(out + i, (load<V>(g + i) - load<V>(v + i) * inverse_norm * share) * factor);
      for (; i < p.size; ++i) out[i] = (g[i] - v[i] * inverse_norm * share) * factor;
    }
  });
}

}  // namespace
}  // namespace otface::margin
