// What is computed along a row of x or w: its length, the target's cosine, and the projection of a gradient.
#pragma once

#include "margin/cuda_kernels.h"
#include "margin/element.cuh"

namespace otface::margin {

// x' = x 2^-e with |x| = f 2^e and 1/2 <= f < 1;  cos = <x', w_y> / (|x'| |w_y|);  logit = s margin(cos).
//
// A warp per row; no shared memory. The lanes go over the columns one by one, three times: |x|; x', |x'| and <x', w_y>;
// |w_y|; and once more where x and w_y are aligned. The first time, x comes from memory, later from the cache: B d
// (elements of x, w and x') bytes are moved. All sums are in double: the sum of a product of two floats is then right to
// the last bit of a float, so that the target's cosine has no error that its margin's slope could magnify but that of x'
// and w themselves.
__device__ __forceinline__ Matrix scaled_x_of(const StartParams& p) {
  return {p.scaled_x, p.product_dtype, p.x.rows, p.x.cols, p.x.cols};
}
template <class T>
__global__ void __launch_bounds__(kThreads) start_rows(const __grid_constant__ StartParams p) {
  const int64_t index = simt::block_index() * kRowsPerBlock + warp_index();
  if (index >= p.x.rows) return;
  const int lane = lane_index();
  if (index == 0 && lane == 0) *p.any_rescaled = 0;
  const int64_t size = p.x.cols, label = p.labels[index];
  const bool ignored = label == p.ignore_index, takes_part = !ignored || !p.drop_ignored;
  const bool has_target = !ignored && label >= 0 && label < p.weight.rows;

  Row row{};
  row.most = -kInfinity;
  row.target = ignored ? -1 : has_target ? static_cast<double>(label) : -2;
  if (!ignored && !has_target) row.logit = row.slope = kNaN;

  if (takes_part) {
    const Length length = length_of<T>(size, [&](int64_t j) { return load_element(p.x, index, j); });
    int exponent;
    std::frexp(length.root, &exponent);
    exponent += length.exponent;
    // Shorter than 2^-1022: x' stays shorter than 1/2. Of infinite length: NaN, as 0 * inf would be.
    row.power = length.root < kInfinity ? std::ldexp(1.0, exponent < -1022 ? 1022 : -exponent) : kNaN;
  }

  Length target{};
  const auto target_at = [&](int64_t j) { return load_element(p.weight, label, j); };
  if (has_target) target = length_of<T>(size, target_at);
  const double target_scale = std::ldexp(1.0, -target.exponent);

  double squares = 0, product = 0;
  for (int64_t j = lane; j < size; j += 32) {
    const double x = takes_part ? load_element(p.x, index, j) * row.power : 0;
    const double stored = store_element(p.scaled_x, p.product_dtype, index * size + j, x);
    squares += stored * stored;
    if (has_target) product += stored * (target_at(j) * target_scale);
  }
  squares = warp_sum(squares);
  product = warp_sum(product);
  row.inverse_norm = squares == 0 ? 0 : 1 / std::sqrt(squares);
  if (has_target) {
    // All lanes have the same numbers, and so take the same way.
    const double cosine = target.root == 0 ? 0 : product * row.inverse_norm / target.root;
    const bool is_near = 1 - std::fabs(cosine) < least_distance_from_one(p.product_dtype);
    const double sign = cosine > 0 ? 1 : -1;
    Angle angle = angle_of_cosine(cosine);
    if (is_near) {
      const auto stored_at = [&](int64_t j) { return load_element(scaled_x_of(p), index, j); };
      const Chord chord{row.inverse_norm, target.root, target_scale, sign};
      angle = angle_of_chord(cosine, length_of_chord(chord, size, stored_at, target_at));
    }
    const Margined margined = apply_margin(p.margin, angle);
    row.logit = p.scale * margined.value;
    row.slope = p.scale * margined.slope;
    row.aligned = is_near && margined.is_steep ? sign : 0;
  }
  if (lane == 0) p.rows[index] = row;
}

template <class T>
const char* launch_start(const StartParams& params, simt::Stream stream) {
  for (const DType dtype : {params.x.dtype, params.weight.dtype, params.product_dtype})
    if ((dtype == DType::float64) != params.is_double) return "float64 goes with float64 alone";
  return simt::launch(start_rows<T>, {blocks_of(params.x.rows), kThreads, 0}, stream, params);
}

// A row of up to 512 elements is held in registers; a lane's 16 of them are loaded before the first is used.
template <class T>
constexpr int kRowPerLane = sizeof(T) == 8 ? 8 : 16;

// 1 / |w'_j|, and the exponents
//
// A warp per class; no shared memory; w is read once. The squares are summed in double, because those of floats leave
// float's range: one conversion and one multiply-add for each 2 or 4 bytes from memory.
template <class T, class E>
__global__ void __launch_bounds__(kThreads) write_inverse_norms(const __grid_constant__ NormsParams p) {
  using Stored = typename E::Stored;
  const int64_t index = simt::block_index() * kRowsPerBlock + warp_index();
  if (index >= p.weight.rows) return;
  const int64_t size = p.weight.cols;
  const Stored* w = static_cast<const Stored*>(p.weight.data) + index * p.weight.row_stride;
  Stripe<T, kRowPerLane<T>, sizeof(Stored)> stripe;
  double sum = 0;
  for (int64_t begin = 0; begin < size; begin += stripe.columns) {
    stripe.load(E(), w + begin, size - begin, 0);
#pragma unroll
    for (int q = 0; q < stripe.groups; ++q) {
#pragma unroll
      for (int k = 0; k < stripe.group; ++k) sum += static_cast<double>(stripe.v[q][k]) * stripe.v[q][k];
    }
  }
  const Length length = length_of<T>(warp_sum(sum), size, [&](int64_t j) { return double(E::read(w[j])); });
  if (lane_index() != 0) return;
  const int exponent = rescaling_exponent(length, p.weight.dtype);
  p.exponents[index] = exponent;
  if (exponent != 0) simt::mark(p.any_rescaled);
  static_cast<T*>(p.inverse_norms)[index] = static_cast<T>(inverse_of(length, exponent));
}

template <class T>
const char* launch_inverse_norms(const NormsParams& params, simt::Stream stream) {
  return with_element<T>(params.weight.dtype, [&](auto element) {
    return simt::launch(write_inverse_norms<T, decltype(element)>, {blocks_of(params.weight.rows), kThreads, 0}, stream,
                        params);
  });
}

// out = factor (g - u <u, g>) with u = v shrink inverse_norm, where none of these need fit into Real. All lanes together,
// element by element, in double.
template <class T, class E>
__device__ void project_rescaled(const T* g, const typename E::Stored* v, T* out, int64_t size, double shrink,
                                 double inverse_norm, double factor) {
  const auto unit = [&](int64_t j) { return static_cast<double>(E::read(v[j])) * shrink * inverse_norm; };
  double dot = 0;
  for (int64_t j = lane_index(); j < size; j += 32) dot += static_cast<double>(g[j]) * unit(j);
  const double along = warp_sum(dot);
  for (int64_t j = lane_index(); j < size; j += 32)
    out[j] = static_cast<T>((static_cast<double>(g[j]) - unit(j) * along) * factor);
}

// out = factor (g - u <u, g>),   u = v / |v|
//
// A warp per row; no shared memory. g and v are read once and out is written, up to 512 columns; of longer rows all
// stripes but the last are read again, from the cache, in the opposite order. <v, g> is summed in double: g may be
// mostly its part along v, and the error of a sum in float, which grows with the size, would stay in the little that is
// left. That is one multiply-add in double for 12 bytes of memory. The rest is in Real: right to the rounding of g.
template <class T, class E>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<T>)
    project_rows(const __grid_constant__ ProjectParams p) {
  using Stored = typename E::Stored;
  using Real = Element<RealType<T>::dtype>;
  const int64_t index = simt::block_index() * kRowsPerBlock + warp_index();
  if (index >= p.count) return;
  const T* g = static_cast<const T*>(p.grad) + index * p.size;
  T* out = static_cast<T*>(p.out) + index * p.size;
  const Stored* v = static_cast<const Stored*>(p.v.data) + index * p.v.row_stride;
  const int exponent = p.exponents == nullptr ? 0 : p.exponents[index];
  const double factor = p.rows == nullptr ? std::ldexp(1.0, -exponent) : p.rows[index].power;
  const double inverse = p.rows == nullptr ? static_cast<double>(static_cast<const T*>(p.inverse_norms)[index])
                                           : p.rows[index].inverse_norm;

  if (exponent != 0) {
    project_rescaled<T, E>(g, v, out, p.size, std::ldexp(1.0, -exponent), inverse, factor);
    return;
  }

  Stripe<T, kRowPerLane<T>, sizeof(Stored)> of_g, of_v;
  const int64_t last = (p.size - 1) / of_g.columns * of_g.columns;
  double dot = 0;
  for (int64_t begin = 0; begin <= last; begin += of_g.columns) {
    of_g.load(Real(), g + begin, p.size - begin, 0);
    of_v.load(E(), v + begin, p.size - begin, 0);
#pragma unroll
    for (int q = 0; q < of_g.groups; ++q) {
#pragma unroll
      for (int k = 0; k < of_g.group; ++k) dot += static_cast<double>(of_g.v[q][k]) * of_v.v[q][k];
    }
  }
  const T along = static_cast<T>(warp_sum(dot) * inverse), scale = static_cast<T>(inverse);
  for (int64_t begin = last; begin >= 0; begin -= of_g.columns) {
    if (begin != last) {
      of_g.load(Real(), g + begin, p.size - begin, 0);
      of_v.load(E(), v + begin, p.size - begin, 0);
    }
#pragma unroll
    for (int q = 0; q < of_g.groups; ++q) {
#pragma unroll
      for (int k = 0; k < of_g.group; ++k) {
        const T x = of_g.v[q][k] - of_v.v[q][k] * scale * along;
        // A power of x may be beyond float, its product need not be. A row that takes no part has no gradient, whatever
        // is in the weights.
        of_g.v[q][k] = factor == 1 ? x : factor == 0 ? T(0) : static_cast<T>(x * factor);
      }
    }
    of_g.store(Real(), out + begin, p.size - begin);
  }
}

template <class T>
const char* launch_project(const ProjectParams& params, simt::Stream stream) {
  return with_element<T>(params.v.dtype, [&](auto element) {
    return simt::launch(project_rows<T, decltype(element)>, {blocks_of(params.count), kThreads, 0}, stream, params);
  });
}

}  // namespace otface::margin
