// Logits from the products of all classes, and back. Each entry is read once and written once.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
#pragma once

#include "margin/cpu_softmax.h"

namespace otface::margin {
namespace {

template <class T>
void logits(const LogitsParams& p, const Executor& executor) {
  using V = Vec<T>;
  const Chunk& chunk = p.chunk;
  const T* inverse_norms = static_cast<const T*>(chunk.inverse_norms);
  run_stretches(executor, chunk.batch, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Row& row = p.rows[b];
      T* out = static_cast<T*>(p.products) + b * p.row_stride;
      const T factor = row.target == out_of_range ? std::numeric_limits<T>::quiet_NaN()
                                                  : static_cast<T>(chunk.scale * row.inverse_norm);
      map_vectors(out, inverse_norms, chunk.classes, out,
                  [&](int64_t, V product, V norm) __attribute__((always_inline)) { return product * norm * factor; });
      const int64_t target = place_of_target(chunk, row);
      if (target >= 0) out[target] = static_cast<T>(row.logit);
    }
  });
}

template <class T>
void logits_backward(const LogitsBackwardParams& p, const Executor& executor) {
  using V = Vec<T>;
  const Chunk& chunk = p.chunk;
  const T* inverse_norms = static_cast<const T*>(chunk.inverse_norms);
  run_stretches(executor, chunk.batch, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Row& row = p.rows[b];
      const T* grad = static_cast<const T*>(p.grad_logits) + b * p.row_stride;
      T* out = static_cast<T*>(p.out) + b * chunk.classes;
      const T factor = row.target == out_of_range ? std::numeric_limits<T>::quiet_NaN()
                                                  : static_cast<T>(chunk.scale * row.inverse_norm);
      if (p.col_stride == 1)
        map_vectors(grad, inverse_norms, chunk.classes, out,
                    [&](int64_t, V g, V norm) __attribute__((always_inline)) { return g * norm * factor; });
      else
        for (int64_t j = 0; j < chunk.classes; ++j) out[j] = grad[j * p.col_stride] * inverse_norms[j] * factor;
      const int64_t target = place_of_target(chunk, row);
      if (target < 0) continue;
      const double of_cosine = static_cast<double>(grad[target * p.col_stride]) * row.slope;
      if (row.aligned != 0) {
        p.own[b] = of_cosine;
        out[target] = 0;
      } else {
        out[target] = static_cast<T>(of_cosine * row.inverse_norm * static_cast<double>(inverse_norms[target]));
      }
    }
  });
}

}  // namespace
}  // namespace otface::margin
