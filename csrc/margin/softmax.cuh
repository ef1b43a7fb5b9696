// The margin-softmax loss of chunks of classes, and its gradient with respect to the cosines.
#pragma once

#include "margin/cuda_kernels.h"
#include "margin/row.h"
#include "margin/stripe.cuh"

namespace otface::margin {

// Sums over the classes of a stripe, as in Row.
struct Partial {
  double most, sum, weighted;
};

// A lane holds 16 floats, or 8 doubles: 2 KB of a row per warp are on their way at a time, and 2 KB of norms.
template <class T>
using ForwardStripe = Stripe<T, 64 / sizeof(T), sizeof(T)>;

__host__ __device__ inline int64_t stripes_of(int64_t classes, int64_t columns) {
  return (classes + columns - 1) / columns;
}

//   cos_j = product_j / (|x'| |w_j|), -inf for the target;  most = max cos,  sum = sum_j exp(s (cos_j - most)),
//   weighted = sum_j u_j s cos_j
//
// A warp per stripe of a row, eight rows to a block, which share the norms in the cache; the stripe stays in registers,
// so that there is one exponential per class; no shared memory. 4 bytes per product are read, and 4 written if cosines
// are kept (8 in double); a hundredth more for the partial sums. The stripe's size is fixed, so a row's bits do not
// depend on the batch. Rows without a target in range are left out.
//
// In Real: a lane's sums of at most 4 terms, four (two) of them side by side. In double: everything between lanes.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    write_cosines(const __grid_constant__ ForwardChunkParams p, Partial* partials) {  // [B, stripes]
  using S = ForwardStripe<T>;
  using Real = Element<RealType<T>::dtype>;
  const Chunk& chunk = p.chunk;
  const int64_t row_blocks = (chunk.batch + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t stripe = simt::block_index() / row_blocks;
  const int64_t index = simt::block_index() % row_blocks * kRowsPerBlock + warp_index();
  if (index >= chunk.batch || p.rows[index].target < 0) return;
  const int64_t begin = stripe * S::columns, count = chunk.classes - begin;
  const int target = place_of_target(p.rows[index], chunk.first + begin);
  const T inverse_norm_x = static_cast<T>(p.rows[index].inverse_norm);
  T* const row = static_cast<T*>(p.products) + index * p.row_stride + begin;

  S cosines, other;
  cosines.load(Real(), row, count, 0);
  other.load(Real(), static_cast<const T*>(chunk.inverse_norms) + begin, count, 0);
  T most = static_cast<T>(-kInfinity), check = 0;  // NaN or infinite as soon as a cosine is
#pragma unroll
  for (int q = 0; q < S::groups; ++q) {
#pragma unroll
    for (int k = 0; k < S::group; ++k) {
      const int j = S::column(q) + k;
      const T cosine = cosine_of(cosines.v[q][k], inverse_norm_x, other.v[q][k]);
      check += cosine;
      cosines.v[q][k] = j == target || j >= count ? static_cast<T>(-kInfinity) : cosine;
      most = cosines.v[q][k] > most ? cosines.v[q][k] : most;
    }
  }
  if (p.keep_cosines) cosines.store(Real(), row, count);

  most = warp_most(most);
  const T base = most == static_cast<T>(-kInfinity) ? 0 : most;
  const T to_exponent = static_cast<T>(chunk.scale * kLog2OfE);
  T sums[S::group] = {};
#pragma unroll
  for (int q = 0; q < S::groups; ++q) {
#pragma unroll
    for (int k = 0; k < S::group; ++k) sums[k] += simt::exp2_of((cosines.v[q][k] - base) * to_exponent);
  }
  double sum = static_cast<double>(check - check);
#pragma unroll
  for (int k = 0; k < S::group; ++k) sum += static_cast<double>(sums[k]);
  sum = warp_sum(sum);

  double weighted = 0;
  if (p.smoothing) {
    const bool all_one = p.class_weight == nullptr;
    if (!all_one) other.load(Real(), static_cast<const T*>(p.class_weight) + begin, count, 0);
    T terms[S::group] = {};
#pragma unroll
    for (int q = 0; q < S::groups; ++q) {
#pragma unroll
      for (int k = 0; k < S::group; ++k) {
        const T cosine = cosines.v[q][k] == static_cast<T>(-kInfinity) ? T(0) : cosines.v[q][k];
        terms[k] += all_one ? cosine : cosine * other.v[q][k];
      }
    }
#pragma unroll
    for (int k = 0; k < S::group; ++k) weighted += static_cast<double>(terms[k]);
    weighted = chunk.scale * warp_sum(weighted);
  }
  if (lane_index() == 0)
    partials[index * stripes_of(chunk.classes, S::columns) + stripe] = {static_cast<double>(most), sum, weighted};
}

// a and b together; the exponentials of both relative to the larger `most`.
__device__ __forceinline__ Partial merged(const Partial& a, const Partial& b, double to_exponent) {
  const double most = b.most > a.most ? b.most : a.most;
  const double of_a = a.most == most ? a.sum : a.sum * simt::exp2_of((a.most - most) * to_exponent);
  const double of_b = b.most == most ? b.sum : b.sum * simt::exp2_of((b.most - most) * to_exponent);
  return {most, of_a + of_b, a.weighted + b.weighted};
}

// sum = sum_k sum_k exp(s (most_k - most)) over the stripes k and what the row had before;  most = max most_k
//
// A warp per row, each lane every 32nd stripe in their order, then the lanes two by two, then what the row had. No
// shared memory; 24 bytes read per stripe.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_partials(const __grid_constant__ ForwardChunkParams p, const Partial* partials) {  // [B, stripes]
  const int64_t index = simt::block_index() * kRowsPerBlock + warp_index();
  if (index >= p.chunk.batch || p.rows[index].target < 0) return;
  const int64_t stripes = stripes_of(p.chunk.classes, ForwardStripe<T>::columns);
  const double to_exponent = p.chunk.scale * kLog2OfE;
  Partial total{-kInfinity, 0, 0};
  for (int64_t k = lane_index(); k < stripes; k += 32)
    total = merged(total, partials[index * stripes + k], to_exponent);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) {
    const Partial other{simt::shuffle_xor(total.most, bit), simt::shuffle_xor(total.sum, bit),
                        simt::shuffle_xor(total.weighted, bit)};
    total = merged(total, other, to_exponent);
  }
  if (lane_index() != 0) return;
  Row& row = p.rows[index];
  total = merged({row.most, row.sum, row.weighted}, total, to_exponent);
  row.most = total.most;
  row.sum = total.sum;
  row.weighted = total.weighted;
}

template <class T>
size_t workspace_of_forward_chunk(const ForwardChunkParams& params) {
  const int64_t stripes = stripes_of(params.chunk.classes, ForwardStripe<T>::columns);
  return static_cast<size_t>(params.chunk.batch * stripes) * sizeof(Partial);
}

template <class T>
const char* launch_forward_chunk(const ForwardChunkParams& params, void* workspace, simt::Stream stream) {
  const int64_t row_blocks = blocks_of(params.chunk.batch);
  const int64_t stripes = stripes_of(params.chunk.classes, ForwardStripe<T>::columns);
  auto* partials = static_cast<Partial*>(workspace);
  const char* error = simt::launch(write_cosines<T>, {row_blocks * stripes, kThreads, 0}, stream, params, partials);
  if (*error != 0) return error;
  return simt::launch(merge_partials<T>, {row_blocks, kThreads, 0}, stream, params, partials);
}

//   loss = (1 - e) u_y log(1 + exp(rest - l)) + (e / C) (lse sum(u) - sum_j u_j logit_j)
//
// A thread per row, in double; 64 bytes read.
template <class T>
__global__ void __launch_bounds__(kThreads) write_loss(const __grid_constant__ LossParams p) {
  const int64_t index = simt::block_index() * kThreads + simt::thread_index();
  if (index >= p.batch) return;
  static_cast<T*>(p.loss)[index] = static_cast<T>(loss_of(p.rows[index], p.settings, sizeof(T) == 8));
}

template <class T>
const char* launch_loss(const LossParams& params, simt::Stream stream) {
  return simt::launch(write_loss<T>, {(params.batch + kThreads - 1) / kThreads, kThreads, 0}, stream, params);
}

// What all classes of a row have in common.
template <class T>
struct RowFactors {
  T inverse_norm;
  T shift, offset;    // p_j = 2^((cos_j - shift) * to_exponent + offset): most digits where p is large
  T of_p, of_weight;  // H_j |w_j| = of_p p_j - of_weight u_j
  T of_target;        // H_y |w_y|, 0 for an aligned row
  double of_cosine;   // dL/dcos_y
  bool is_zero;       // H = 0

  __device__ __forceinline__ void set(const BackwardChunkParams& p, int64_t index) {
    const Row& row = p.rows[index];
    const double grad = static_cast<double>(static_cast<const T*>(p.grad_loss)[index]);
    const RowGradient g = gradient_of(row, p.settings, sizeof(T) == 8, grad);
    inverse_norm = static_cast<T>(row.inverse_norm);
    shift = static_cast<T>(row.most);
    offset = static_cast<T>((row.most * p.settings.scale - g.lse) * kLog2OfE);
    of_p = static_cast<T>(g.softmax * row.inverse_norm);
    of_weight = static_cast<T>(g.uniform * row.inverse_norm);
    of_target = row.aligned != 0 ? T(0) : static_cast<T>(g.target * row.inverse_norm);
    of_cosine = grad == 0 ? 0 : g.target;
    is_zero = row.target == ignored || grad == 0;
  }
};

// Element by element: 16 floats or 8 doubles per lane and step, and several steps for what is computed once per row to
// pay.
template <class T, class E>
using BackwardStripe =
    Stripe<T, 64 / sizeof(T), sizeof(typename E::Stored) < sizeof(T) ? sizeof(typename E::Stored) : sizeof(T)>;
constexpr int64_t kBackwardColumns = 2048;  // of a block

//   H_j = g s (alpha p_j - (e / C) u_j) / (|x'| |w_j|),  p_j = exp(s cos_j - lse),  alpha = (1 - e) u_y + (e / C) sum u
//   H_y = g slope (alpha p_y - (1 - e) u_y - (e / C) u_y) / (|x'| |w_y|)
//
// A warp per row, eight rows and 2048 columns to a block. What belongs to a row takes logarithms and exponentials in
// double: eight threads compute it for the block, side by side. 4 bytes per product are read, 4 or 2 written (double:
// 8, 8); the norms, and weights where labels are smoothed, come from the cache.
// Shared memory: RowFactors[8].
template <class T, class E>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    write_loss_gradient(const __grid_constant__ BackwardChunkParams p) {
  using S = BackwardStripe<T, E>;
  using Real = Element<RealType<T>::dtype>;
  const Chunk& chunk = p.chunk;
  const int64_t row_blocks = (chunk.batch + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t first_row = simt::block_index() % row_blocks * kRowsPerBlock, index = first_row + warp_index();
  auto* all_factors = reinterpret_cast<RowFactors<T>*>(simt::shared_memory());
  const int thread = simt::thread_index();
  const int64_t start = simt::block_index() / row_blocks * kBackwardColumns;
  if (thread < kRowsPerBlock && first_row + thread < chunk.batch) {
    all_factors[thread].set(p, first_row + thread);
    if (start == 0) p.own[first_row + thread] = all_factors[thread].of_cosine;
  }
  simt::sync_block();
  if (index >= chunk.batch) return;
  const RowFactors<T> factors = all_factors[warp_index()];

  const T* products = static_cast<const T*>(p.products) + index * p.row_stride;
  auto* out = static_cast<typename E::Stored*>(p.out) + index * chunk.classes;
  const T* inverse_norms = static_cast<const T*>(chunk.inverse_norms);
  // u matters where labels are smoothed only
  const T* class_weight = p.settings.label_smoothing == 0 ? nullptr : static_cast<const T*>(p.settings.class_weight);
  const T to_exponent = static_cast<T>(chunk.scale * kLog2OfE);
  const int64_t rest = chunk.classes - start, end = start + (rest < kBackwardColumns ? rest : kBackwardColumns);
  for (int64_t begin = start; begin < end; begin += S::columns) {
    const int64_t count = chunk.classes - begin;
    const int target = place_of_target(p.rows[index], chunk.first + begin);
    S x, norms, weights;
    x.load(Real(), products + begin, count, 0);
    norms.load(Real(), inverse_norms + begin, count, 0);
    if (class_weight != nullptr) weights.load(Real(), class_weight + chunk.first + begin, count, 0);
#pragma unroll
    for (int q = 0; q < S::groups; ++q) {
#pragma unroll
      for (int k = 0; k < S::group; ++k) {
        const T cosine = p.are_cosines ? x.v[q][k] : cosine_of(x.v[q][k], factors.inverse_norm, norms.v[q][k]);
        const T probability = simt::exp2_of((cosine - factors.shift) * to_exponent + factors.offset);
        const T weight = class_weight == nullptr ? T(1) : weights.v[q][k];
        T h = factors.of_p * probability - factors.of_weight * weight;
        if (S::column(q) + k == target) h = factors.of_target;
        x.v[q][k] = factors.is_zero ? T(0) : h * norms.v[q][k];
      }
    }
    x.store(E(), out + begin, count);
  }
}

template <class T>
const char* launch_backward_chunk(const BackwardChunkParams& params, simt::Stream stream) {
  const int64_t blocks = blocks_of(params.chunk.batch) * stripes_of(params.chunk.classes, kBackwardColumns);
  return with_element<T>(params.product_dtype, [&](auto element) {
    return simt::launch(write_loss_gradient<T, decltype(element)>,
                        {blocks, kThreads, kRowsPerBlock * sizeof(RowFactors<T>)}, stream, params);
  });
}

}  // namespace otface::margin
