// Raw products to logits, and the gradient of logits to that of the raw products.
#pragma once

#include "margin/cuda_kernels.h"
#include "margin/stripe.cuh"

namespace otface::margin {

constexpr int64_t kLogitsColumns = 2048;  // of a warp

inline int64_t logits_blocks(const Chunk& chunk) {
  return blocks_of(chunk.batch) * ((chunk.classes + kLogitsColumns - 1) / kLogitsColumns);
}

// The part of a row that a warp works on.
struct Part {
  int64_t index;       // of the row
  int64_t begin, end;  // columns; none where there is no such row

  __device__ __forceinline__ static Part of(const Chunk& chunk) {
    const int64_t row_blocks = (chunk.batch + kRowsPerBlock - 1) / kRowsPerBlock;
    const int64_t index = simt::block_index() % row_blocks * kRowsPerBlock + warp_index();
    const int64_t begin = simt::block_index() / row_blocks * kLogitsColumns, end = begin + kLogitsColumns;
    if (index >= chunk.batch) return {0, 0, 0};
    return {index, begin, end < chunk.classes ? end : chunk.classes};
  }
};

//   logit_j = s product_j / (|x'| |w_j|), and the target's as it is in `rows`
//
// A warp per row, eight rows and 2048 columns to a block, no shared memory. 8 bytes per product (16 in double); the
// norms come from the cache.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    write_logits(const __grid_constant__ LogitsParams p) {
  using S = Stripe<T, 64 / sizeof(T), sizeof(T)>;
  using Real = Element<RealType<T>::dtype>;
  const Chunk& chunk = p.chunk;
  const Part part = Part::of(chunk);
  const Row& row = p.rows[part.index];
  const T inverse_norm = static_cast<T>(row.inverse_norm), logit = static_cast<T>(row.logit);
  const T scale = static_cast<T>(row.target == -2 ? kNaN : chunk.scale);
  T* products = static_cast<T*>(p.products) + part.index * p.row_stride;
  for (int64_t begin = part.begin; begin < part.end; begin += S::columns) {
    const int64_t count = chunk.classes - begin;
    const int target = place_of_target(row, chunk.first + begin);
    S x, norms;
    x.load(Real(), products + begin, count, 0);
    norms.load(Real(), static_cast<const T*>(chunk.inverse_norms) + begin, count, 0);
#pragma unroll
    for (int q = 0; q < S::groups; ++q) {
#pragma unroll
      for (int k = 0; k < S::group; ++k) {
        const T cosine = cosine_of(x.v[q][k], inverse_norm, norms.v[q][k]);
        x.v[q][k] = S::column(q) + k == target ? logit : scale * cosine;
      }
    }
    x.store(Real(), products + begin, count);
  }
}

template <class T>
const char* launch_logits(const LogitsParams& params, simt::Stream stream) {
  return simt::launch(write_logits<T>, {logits_blocks(params.chunk), kThreads, 0}, stream, params);
}

//   H_j = grad_j d logit_j / d cos_j / (|x'| |w_j|):  the slope is s, and the target's is in `rows`
//
// As above. A gradient whose columns are not adjacent is read element by element.
template <class T, class E>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    write_logits_gradient(const __grid_constant__ LogitsBackwardParams p) {
  using Stored = typename E::Stored;
  using S = Stripe<T, 64 / sizeof(T), sizeof(Stored) < sizeof(T) ? sizeof(Stored) : sizeof(T)>;
  using Real = Element<RealType<T>::dtype>;
  const Chunk& chunk = p.chunk;
  const Part part = Part::of(chunk);
  const Row& row = p.rows[part.index];
  const T slope = static_cast<T>(row.target == -2 ? kNaN : chunk.scale * row.inverse_norm);
  const T slope_of_target = row.aligned != 0 ? T(0) : static_cast<T>(row.slope * row.inverse_norm);
  const T* grad = static_cast<const T*>(p.grad_logits) + part.index * p.row_stride;
  auto* out = static_cast<Stored*>(p.out) + part.index * chunk.classes;
  for (int64_t begin = part.begin; begin < part.end; begin += S::columns) {
    const int64_t count = chunk.classes - begin;
    const int target = place_of_target(row, chunk.first + begin);
    S x, norms;
    if (p.col_stride == 1) {
      x.load(Real(), grad + begin, count, 0);
    } else {
      x.load_one_by_one(Real(), grad + begin * p.col_stride, p.col_stride, count, 0);
    }
    norms.load(Real(), static_cast<const T*>(chunk.inverse_norms) + begin, count, 0);
    if (row.aligned != 0 && target >= 0 && target < S::columns && lane_index() == 0)
      p.own[part.index] = static_cast<double>(grad[(begin + target) * p.col_stride]) * row.slope;
#pragma unroll
    for (int q = 0; q < S::groups; ++q) {
#pragma unroll
      for (int k = 0; k < S::group; ++k)
        x.v[q][k] *= (S::column(q) + k == target ? slope_of_target : slope) * norms.v[q][k];
    }
    x.store(E(), out + begin, count);
  }
}

template <class T>
const char* launch_logits_backward(const LogitsBackwardParams& params, simt::Stream stream) {
  return with_element<T>(params.product_dtype, [&](auto element) {
    return simt::launch(write_logits_gradient<T, decltype(element)>, {logits_blocks(params.chunk), kThreads, 0}, stream,
                        params);
  });
}

}  // namespace otface::margin
