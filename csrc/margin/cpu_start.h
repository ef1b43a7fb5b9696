// Before the products: x', what concerns the targets, and the lengths of the class weights.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
#pragma once

#include <cmath>

#include "common/cpu_half.h"
#include "common/cpu_run.h"
#include "common/vec.h"
#include "margin/row.h"

namespace otface::margin {
namespace {

inline double element(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float32: return static_cast<double>(static_cast<const float*>(data)[i]);
    case DType::float64: return static_cast<const double*>(data)[i];
    case DType::float16: return static_cast<double>(half_to_float(static_cast<const uint16_t*>(data)[i]));
    case DType::bfloat16: return static_cast<double>(bfloat_to_float(static_cast<const uint16_t*>(data)[i]));
  }
  return 0;
}

// Where the squares of doubles leave the range, they are taken relative to the largest element.
template <class Get>
Length length_of(int64_t size, const Get& get) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += get(i) * get(i);
  if (sum > 1e-280 && sum < 1e280) return {std::sqrt(sum), 0};
  double most = 0;
  for (int64_t i = 0; i < size; ++i) most = std::fabs(get(i)) > most ? std::fabs(get(i)) : most;
  if (!(sum == sum) || most == std::numeric_limits<double>::infinity()) return {sum, 0};
  if (most == 0) return {0, 0};
  int exponent = std::ilogb(most);
  exponent = exponent < -1020 ? -1020 : exponent;  // so that 2^-exponent is a double
  const double scale = std::ldexp(1.0, -exponent);
  sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += (get(i) * scale) * (get(i) * scale);
  return {std::sqrt(sum), exponent};
}

// A row of x as x' = x 2^-e, with a length in [1/2, 1) where 2^-e is a double.
template <class T, class Get>
OTFACE_INLINE void scale_row(int64_t size, const Get& x, T* scaled, Row& row) {
  const Length length = length_of(size, x);
  int exponent = 0;
  if (length.root > 0 && length.root < std::numeric_limits<double>::infinity()) {
    std::frexp(length.root, &exponent);
    exponent += length.exponent;
    exponent = exponent < -1022 ? -1022 : exponent;
  }
  row.power = std::ldexp(1.0, -exponent);
  row.inverse_norm = inverse_of(length, exponent);
  for (int64_t i = 0; i < size; ++i) scaled[i] = static_cast<T>(x(i) * row.power);
}

// |u_x - u_w|, or |u_x + u_w| if the sign is -1, of unit vectors.
template <class T, class Get>
double chord_of(int64_t size, const T* scaled, double inverse_norm, const Get& w, double sign) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double difference = static_cast<double>(scaled[i]) * inverse_norm - sign * w(i);
    sum += difference * difference;
  }
  return std::sqrt(sum);
}

// The logit of the target, and its slope: in double, the products of a row are few.
template <class T>
void set_target(const StartParams& p, int64_t label, const T* scaled, Row& row) {
  const int64_t size = p.x.cols, w_row = label * p.weight.row_stride;
  const auto w = [&](int64_t i) { return element(p.weight.data, p.weight.dtype, w_row + i); };
  const Length length = length_of(size, w);
  const double shrink = std::ldexp(1.0, -length.exponent);
  double product = 0;
  for (int64_t i = 0; i < size; ++i) product += static_cast<double>(scaled[i]) * ((w(i) * shrink) / length.root);
  const double cosine = length.root == 0 ? 0 : product * row.inverse_norm;
  const bool is_near = 1 - std::fabs(cosine) < least_distance_from_one(p.product_dtype);
  const double sign = cosine > 0 ? 1 : -1;
  const auto unit = [&](int64_t i) { return (w(i) * shrink) / length.root; };
  const Margined target =
      apply_margin(p.margin, is_near ? angle_of_chord(cosine, chord_of(size, scaled, row.inverse_norm, unit, sign))
                                     : angle_of_cosine(cosine));
  row.target = static_cast<double>(label);
  row.logit = p.scale * target.value;
  row.slope = p.scale * target.slope;
  row.aligned = is_near && target.is_steep ? sign : 0;
}

template <class T>
void start(const StartParams& p, const Executor& executor) {
  const int64_t size = p.x.cols;
  *p.any_rescaled = 0;
  run_stretches(executor, p.x.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t x_row = b * p.x.row_stride, label = p.labels[b];
      T* scaled = static_cast<T*>(p.scaled_x) + b * size;
      const bool is_ignored = label == p.ignore_index, in_range = label >= 0 && label < p.weight.rows;
      Row row{};
      row.most = -std::numeric_limits<double>::infinity();
      if (is_ignored && p.drop_ignored) {
        for (int64_t i = 0; i < size; ++i) scaled[i] = 0;
      } else {
        scale_row(size, [&](int64_t i) { return element(p.x.data, p.x.dtype, x_row + i); }, scaled, row);
      }
      if (is_ignored) {
        row.target = ignored;
      } else if (!in_range) {
        row.target = out_of_range;
        row.logit = row.slope = std::numeric_limits<double>::quiet_NaN();
      } else {
        set_target(p, label, scaled, row);
      }
      p.rows[b] = row;
    }
  });
}

// The sum of squares in double, so that no float leaves the range: the row is read from memory once, which takes longer.
template <class T>
double sum_of_squares(const T* v, int64_t size) {
  using Half = typename VecType<T, OTFACE_VEC_BYTES / 2>::type;
  using Wide = typename VecType<double, OTFACE_VEC_BYTES / 2 / sizeof(T) * sizeof(double)>::type;
  constexpr int W = sizeof(Half) / sizeof(T);
  Wide even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * W <= size; i += 2 * W) {
    const Wide a = __builtin_convertvector(load<Half>(v + i), Wide);
    const Wide b = __builtin_convertvector(load<Half>(v + i + W), Wide);
    even += a * a;
    odd += b * b;
  }
  even += odd;
  double sum = 0;
  for (int k = 0; k < W; ++k) sum += even[k];
  for (; i < size; ++i) sum += static_cast<double>(v[i]) * static_cast<double>(v[i]);
  return sum;
}

template <class T>
void inverse_norms(const NormsParams& p, const Executor& executor) {
  const int64_t size = p.weight.cols;
  T* out = static_cast<T*>(p.inverse_norms);
  run_stretches(executor, p.weight.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const T* w = static_cast<const T*>(p.weight.data) + j * p.weight.row_stride;
      const double sum = sum_of_squares(w, size);
      Length length{std::sqrt(sum), 0};
      if (!(sum > 1e-280 && sum < 1e280))
        length = length_of(size, [&](int64_t i) { return static_cast<double>(w[i]); });
      p.exponents[j] = rescaling_exponent(length, p.weight.dtype);
      if (p.exponents[j] != 0) __atomic_store_n(p.any_rescaled, 1, __ATOMIC_RELAXED);
      out[j] = static_cast<T>(inverse_of(length, p.exponents[j]));
    }
  });
}

}  // namespace
}  // namespace otface::margin
