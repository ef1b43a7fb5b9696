// After the product of a chunk of classes: the softmax statistics of each row, the loss, and the gradient of the products.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// A row of the chunk is one task's, in blocks that stay in the first-level cache. Each entry of the product is read once
// and written once, with one exponential.
#pragma once

#include "common/cpu_run.h"
#include "common/vec.h"
#include "margin/row.h"

namespace otface::margin {
namespace {

constexpr int64_t block_size = 1024;

// f(j, vector of products, vector of inverse norms) -> vector to be stored at out + j; the last one may be filled with zeros.
template <class T, class F>
OTFACE_INLINE void map_vectors(const T* products, const T* inverse_norms, int64_t count, T* out, const F& f) {
  using V = Vec<T>;
  constexpr int64_t W = lanes<T>;
  int64_t j = 0;
  for (; j + W <= count; j += W) store(out + j, f(j, load<V>(products + j), load<V>(inverse_norms + j)));
  if (j == count) return;
  T last[2][W] = {};
  const size_t bytes = static_cast<size_t>(count - j) * sizeof(T);
  std::memcpy(last[0], products + j, bytes);
  std::memcpy(last[1], inverse_norms + j, bytes);
  const V v = f(j, load<V>(last[0]), load<V>(last[1]));
  std::memcpy(out + j, &v, bytes);
}

// The class's place in the chunk, or -1.
inline int64_t place_of_target(const Chunk& chunk, const Row& row) {
  const int64_t j = static_cast<int64_t>(row.target) - chunk.first;
  return row.target >= 0 && j >= 0 && j < chunk.classes ? j : -1;
}

// Adds sum_j exp(scale (cos_j - most)) of a block to the row, whichever `most` is the larger. cos is padded with -inf.
template <class T>
OTFACE_INLINE void add_exponentials(const T* cosines, int64_t padded, double scale, Row& row) {
  using V = Vec<T>;
  constexpr int64_t W = lanes<T>;
  V largest = load<V>(cosines);
  for (int64_t j = W; j < padded; j += W) {
    const V c = load<V>(cosines + j);
    largest = c > largest ? c : largest;
  }
  const T most = -least_lane(-largest);
  if (most == -std::numeric_limits<T>::infinity()) return;
  const T k = static_cast<T>(scale * log2_of_e);
  V sum{};
  for (int64_t j = 0; j < padded; j += W) sum += vexp2((load<V>(cosines + j) - most) * k);
  const double m = static_cast<double>(most), s = static_cast<double>(sum_lanes(sum));
  if (m > row.most) {
    row.sum = row.sum * std::exp(scale * (row.most - m)) + s;
    row.most = m;
  } else {
    row.sum += s * std::exp(scale * (m - row.most));
  }
}

template <class T>
void forward_chunk(const ForwardChunkParams& p, const Executor& executor) {
  using V = Vec<T>;
  constexpr int64_t W = lanes<T>;
  const Chunk& chunk = p.chunk;
  const T* inverse_norms = static_cast<const T*>(chunk.inverse_norms);
  const T* class_weight = static_cast<const T*>(p.class_weight);
  run_stretches(executor, chunk.batch, 4, [&](int64_t begin, int64_t end) {
    alignas(64) T cosines[block_size];
    for (int64_t b = begin; b < end; ++b) {
      Row& row = p.rows[b];
      if (row.target < 0) continue;  // no loss, or NaN
      T* products = static_cast<T*>(p.products) + b * p.row_stride;
      const T inverse_norm = static_cast<T>(row.inverse_norm);
      const int64_t target = place_of_target(chunk, row);
      for (int64_t start = 0; start < chunk.classes; start += block_size) {
        const int64_t count = chunk.classes - start < block_size ? chunk.classes - start : block_size;
        const int64_t padded = (count + W - 1) / W * W;
        V check{};  // NaN or infinite as soon as one cosine is
        map_vectors(products + start, inverse_norms + start, count, cosines,
                    [&](int64_t, V product, V norm) __attribute__((always_inline)) {
                      const V c = product * norm * inverse_norm;
                      check += c;
                      return c;
                    });
        const T sum = sum_lanes(check);
        if (!(sum - sum == 0)) row.sum = std::numeric_limits<double>::quiet_NaN();
        for (int64_t j = count; j < padded; ++j) cosines[j] = -std::numeric_limits<T>::infinity();
        const bool has_target = target >= start && target < start + count;
        if (p.smoothing) {
          const T at_target = has_target ? cosines[target - start] : T(0);
          if (has_target) cosines[target - start] = 0;
          double weighted = 0;
          for (int64_t j = 0; j < count; ++j)
            weighted += static_cast<double>(cosines[j]) *
                        (class_weight == nullptr ? 1.0 : static_cast<double>(class_weight[start + j]));
          row.weighted += chunk.scale * weighted;
          if (has_target) cosines[target - start] = at_target;
        }
        if (has_target) cosines[target - start] = -std::numeric_limits<T>::infinity();
        if (p.keep_cosines) std::memcpy(products + start, cosines, static_cast<size_t>(count) * sizeof(T));
        add_exponentials(cosines, padded, chunk.scale, row);
      }
    }
  });
}

template <class T>
void loss(const LossParams& p, const Executor&) {
  for (int64_t b = 0; b < p.batch; ++b)
    static_cast<T*>(p.loss)[b] = static_cast<T>(loss_of(p.rows[b], p.settings, p.is_double));
}

template <class T>
void backward_chunk(const BackwardChunkParams& p, const Executor& executor) {
  using V = Vec<T>;
  const Chunk& chunk = p.chunk;
  const T* inverse_norms = static_cast<const T*>(chunk.inverse_norms);
  const T* class_weight = static_cast<const T*>(p.settings.class_weight);
  const T k = static_cast<T>(chunk.scale * log2_of_e);
  run_stretches(executor, chunk.batch, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Row& row = p.rows[b];
      const double grad_loss = static_cast<double>(static_cast<const T*>(p.grad_loss)[b]);
      const T* products = static_cast<const T*>(p.products) + b * p.row_stride;
      T* out = static_cast<T*>(p.out) + b * chunk.classes;
      if (row.target == ignored || grad_loss == 0) {
        for (int64_t j = 0; j < chunk.classes; ++j) out[j] = 0;
        p.own[b] = 0;
        continue;
      }
      const RowGradient g = gradient_of(row, p.settings, chunk.is_double, grad_loss);
      const T softmax = static_cast<T>(g.softmax * row.inverse_norm);
      // exp(scale cos - lse) as 2^((cos - shift) k + offset): most digits where it is large
      const T shift = static_cast<T>(row.most);
      const T offset = static_cast<T>((row.most * chunk.scale - g.lse) * log2_of_e);
      const T inverse_norm = p.are_cosines ? T(1) : static_cast<T>(row.inverse_norm);
      const auto gradient = [&](V c, V norm) __attribute__((always_inline)) {
        return vexp2((c - shift) * k + offset) * softmax * norm;
      };
      if (p.are_cosines)
        map_vectors(products, inverse_norms, chunk.classes, out,
                    [&](int64_t, V c, V norm) __attribute__((always_inline)) { return gradient(c, norm); });
      else
        map_vectors(products, inverse_norms, chunk.classes, out,
                    [&](int64_t, V product, V norm)
                        __attribute__((always_inline)) { return gradient(product * norm * inverse_norm, norm); });
      if (g.uniform != 0) {
        const T uniform = static_cast<T>(g.uniform * row.inverse_norm);
        for (int64_t j = 0; j < chunk.classes; ++j)
          out[j] -= uniform * inverse_norms[j] * (class_weight == nullptr ? T(1) : class_weight[chunk.first + j]);
      }
      const int64_t target = place_of_target(chunk, row);
      if (target < 0) continue;
      if (row.aligned != 0) {
        p.own[b] = g.target;
        out[target] = 0;
      } else {
        out[target] = static_cast<T>(g.target * row.inverse_norm * static_cast<double>(inverse_norms[target]));
      }
    }
  });
}

}  // namespace
}  // namespace otface::margin
