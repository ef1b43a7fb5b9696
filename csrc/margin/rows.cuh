// What is computed along a row of x or w: its length, the target's cosine, and the projection of a gradient.
#pragma once

#include "margin/cuda_kernels.h"
#include "margin/formula.h"
#include "margin/stripe.cuh"

namespace otface::margin {

// An element of any type; the rows of x are too few for a kernel for each pair of types to pay.
__device__ __forceinline__ double load_element(const Matrix& m, int64_t row, int64_t j) {
  const int64_t offset = row * m.row_stride + j;
  switch (m.dtype) {
    case DType::float32: return static_cast<const float*>(m.data)[offset];
    case DType::float64: return static_cast<const double*>(m.data)[offset];
    case DType::float16: return simt::half_to_float(static_cast<const uint16_t*>(m.data)[offset]);
    default: return simt::bfloat_to_float(static_cast<const uint16_t*>(m.data)[offset]);
  }
}
// Returns what was stored.
__device__ __forceinline__ double store_element(void* data, DType dtype, int64_t offset, double x) {
  if (dtype == DType::float64) return static_cast<double*>(data)[offset] = x;
  const float single = static_cast<float>(x);
  if (dtype == DType::float32) return static_cast<float*>(data)[offset] = single;
  uint16_t& to = static_cast<uint16_t*>(data)[offset];
  to = dtype == DType::float16 ? simt::float_to_half(single) : simt::float_to_bfloat(single);
  return dtype == DType::float16 ? simt::half_to_float(to) : simt::bfloat_to_float(to);
}

// root * 2^exponent
struct Length {
  double root;
  int exponent;
};

// From the sum of squares, all lanes together. Of floats it cannot leave double's range; where that of doubles may
// have, they are read once more, scaled by their largest. read(j): element j.
template <class T, class Read>
__device__ __forceinline__ Length length_of(double sum_of_squares, int64_t size, Read read) {
  if constexpr (sizeof(T) == 8) {
    if (!(sum_of_squares > 0x1p-900 && sum_of_squares < 0x1p900)) {
      double largest = 0;
      for (int64_t j = lane_index(); j < size; j += 32) {
        const double x = std::fabs(read(j));
        largest = x > largest ? x : largest;
      }
      largest = warp_most(largest);
      if (largest > 0 && largest < kInfinity) {
        int exponent;
        std::frexp(largest, &exponent);
        exponent = exponent < -1020 ? -1020 : exponent;  // so that 2^-exponent is a number
        const double scale = std::ldexp(1.0, -exponent);
        double sum = 0;
        for (int64_t j = lane_index(); j < size; j += 32) sum += (read(j) * scale) * (read(j) * scale);
        return {std::sqrt(warp_sum(sum)), exponent};
      }
    }
  }
  return {std::sqrt(sum_of_squares), 0};
}
template <class T, class Read>
__device__ __forceinline__ Length length_of(int64_t size, Read read) {
  double sum = 0;
  for (int64_t j = lane_index(); j < size; j += 32) sum += read(j) * read(j);
  return length_of<T>(warp_sum(sum), size, read);
}

// 1 / length, or 0 for a row that counts as zero. NaN stays, and an infinite length gives 0, which spoils the products
// of that row: they are infinite or NaN.
template <class T>
__device__ __forceinline__ double inverse_of(const Length& length) {
  if (std::ldexp(length.root, length.exponent) < RealType<T>::least_normal) return 0;
  return std::ldexp(1 / length.root, -length.exponent);
}

// x' = x 2^-e with |x| = f 2^e and 1/2 <= f < 1;  cos = <x', w_y> / (|x'| |w_y|);  logit = s margin(cos).
//
// A warp per row; no shared memory. The lanes go over the columns one by one, three times: |x|; x', |x'| and <x', w_y>;
// |w_y|. The first time, x comes from memory, later from the cache: B d (elements of x, w and x') bytes are moved.
// All sums are in double: the sum of a product of two floats is then right to the last bit of a float, so that the
// target's cosine has no error that its margin's slope could magnify but that of x' and w themselves.
template <class T>
__global__ void __launch_bounds__(kThreads) start_rows(const __grid_constant__ StartParams p) {
  const int64_t index = simt::block_index() * kRowsPerBlock + warp_index();
  if (index >= p.x.rows) return;
  const int lane = lane_index();
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
  if (lane != 0) return;

  row.inverse_norm = squares == 0 ? 0 : 1 / std::sqrt(squares);
  if (has_target) {
    const bool is_zero = inverse_of<T>(target) == 0 && target.root < kInfinity;
    const double cosine = is_zero ? 0 : product * row.inverse_norm / target.root;
    const double epsilon = p.product_dtype == DType::float64   ? 0x1p-52
                           : p.product_dtype == DType::float32 ? 0x1p-23
                           : p.product_dtype == DType::float16 ? 0x1p-10
                                                               : 0x1p-7;
    const Margined margined = apply_margin(p.margin, cosine, std::sqrt(epsilon));
    row.logit = p.scale * margined.value;
    row.slope = p.scale * margined.slope;
  }
  p.rows[index] = row;
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

// 1 / |w_j|
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
  if (lane_index() == 0) static_cast<T*>(p.inverse_norms)[index] = static_cast<T>(inverse_of<T>(length));
}

template <class T>
const char* launch_inverse_norms(const NormsParams& params, simt::Stream stream) {
  return with_element<T>(params.weight.dtype, [&](auto element) {
    return simt::launch(write_inverse_norms<T, decltype(element)>, {blocks_of(params.weight.rows), kThreads, 0}, stream,
                        params);
  });
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
  const double factor = p.rows == nullptr ? 1 : p.rows[index].power;
  const double inverse = p.rows == nullptr ? static_cast<double>(static_cast<const T*>(p.inverse_norms)[index])
                                           : p.rows[index].inverse_norm;

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
