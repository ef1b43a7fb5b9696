// Elements of any type, one by one, and what a warp computes from a row of them.
#pragma once

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

// Of an aligned row and its target: what their unit vectors differ by, in the sign s of their cosine c = s (1 - d^2 / 2).
struct Chord {
  double inverse_norm_x, root_w, shrink_w;  // u_x = x' inverse_norm_x, u_w = w shrink_w / root_w
  double sign;

  __device__ __forceinline__ double of_x(double x) const { return x * inverse_norm_x; }
  __device__ __forceinline__ double of_w(double w) const { return w * shrink_w / root_w; }
  // u_x - s u_w
  __device__ __forceinline__ double difference(double x, double w) const { return of_x(x) - sign * of_w(w); }
};

// |u_x - s u_w|, all lanes together; read_x(j), read_w(j): element j.
template <class ReadX, class ReadW>
__device__ __forceinline__ double length_of_chord(const Chord& chord, int64_t size, ReadX read_x, ReadW read_w) {
  double sum = 0;
  for (int64_t j = lane_index(); j < size; j += 32) {
    const double difference = chord.difference(read_x(j), read_w(j));
    sum += difference * difference;
  }
  return std::sqrt(warp_sum(sum));
}

}  // namespace otface::margin
