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

inline double power_of_two(int exponent) { return std::ldexp(1.0, exponent); }

// |v|, also where the squares of doubles leave the range.
template <class Get>
double length_of(int64_t size, const Get& get) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += get(i) * get(i);
  if (sum > 1e-280 && sum < 1e280) return std::sqrt(sum);
  double most = 0;
  for (int64_t i = 0; i < size; ++i) most = std::fabs(get(i)) > most ? std::fabs(get(i)) : most;
  if (!(sum == sum) || most == std::numeric_limits<double>::infinity()) return sum;
  if (most == 0) return 0;
  const double half = power_of_two(-std::ilogb(most) / 2);  // twice, since 2^-ilogb itself may be out of range
  sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += (get(i) * half * half) * (get(i) * half * half);
  return std::sqrt(sum) / half / half;
}

// An inverse would leave the range: the row counts as zero.
template <class T>
bool is_zero(double length) {
  return length < static_cast<double>(std::numeric_limits<T>::min());
}

// x' = x 2^-e with a length in [1/2, 1), and the cosine of the target, all in double: the products of a row are few.
template <class T>
void start(const StartParams& p, const Executor& executor) {
  const int64_t size = p.x.cols;
  const double least_sine = std::sqrt(static_cast<double>(std::numeric_limits<T>::epsilon()));
  run_stretches(executor, p.x.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t x_row = b * p.x.row_stride, label = p.labels[b];
      T* scaled = static_cast<T*>(p.scaled_x) + b * size;
      const bool is_ignored = label == p.ignore_index, in_range = label >= 0 && label < p.weight.rows;
      const auto x = [&](int64_t i) { return element(p.x.data, p.x.dtype, x_row + i); };
      const double length = is_ignored && p.drop_ignored ? 0 : length_of(size, x);
      int exponent = 0;
      if (length > 0 && length < std::numeric_limits<double>::infinity()) std::frexp(length, &exponent);
      const int half = exponent / 2;  // 2^-e itself may be out of range
      const double first = power_of_two(-half), second = power_of_two(half - exponent);
      Row row{};
      row.power = first * second;
      row.inverse_norm = length == 0 ? 0 : 1 / ((length * first) * second);
      if (is_ignored && p.drop_ignored) {
        row.power = 0;
        for (int64_t i = 0; i < size; ++i) scaled[i] = 0;
      } else {
        for (int64_t i = 0; i < size; ++i) scaled[i] = static_cast<T>((x(i) * first) * second);
      }
      row.most = -std::numeric_limits<double>::infinity();
      if (is_ignored) {
        row.target = ignored;
      } else if (!in_range) {
        row.target = out_of_range;
        row.logit = row.slope = std::numeric_limits<double>::quiet_NaN();
      } else {
        const int64_t w_row = label * p.weight.row_stride;
        const auto w = [&](int64_t i) { return element(p.weight.data, p.weight.dtype, w_row + i); };
        const double w_length = length_of(size, w);
        double product = 0;
        for (int64_t i = 0; i < size; ++i) product += static_cast<double>(scaled[i]) * (w(i) / w_length);
        const Margined target =
            apply_margin(p.margin, is_zero<T>(w_length) ? 0 : product * row.inverse_norm, least_sine);
        row.target = static_cast<double>(label);
        row.logit = p.scale * target.value;
        row.slope = p.scale * target.slope;
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
      double length = std::sqrt(sum);
      if (!(sum > 1e-280 && sum < 1e280))
        length = length_of(size, [&](int64_t i) { return static_cast<double>(w[i]); });
      out[j] = is_zero<T>(length) ? T(0) : static_cast<T>(1 / length);
    }
  });
}

}  // namespace
}  // namespace otface::margin
