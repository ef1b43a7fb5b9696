// The margins: what happens to the cosine of a target. The same code for every device.
#pragma once

#include <cmath>

#include "margin/params.h"

#if defined(__CUDACC__)
#define OTFACE_HOST_DEVICE __host__ __device__
#else
#define OTFACE_HOST_DEVICE
#endif

namespace otface::margin {
namespace {

// The target's angle theta, from 0 to pi.
struct Angle {
  double cosine, theta, sine;
};

// How near to 1 |cos| is where the angle is no more to be had from the cosine, with a sine s = sqrt(2 (1 - |cos|)).
//
// Products in a type of rounding u leave u / s of the gradient of the angle, relative to itself: a projection takes two
// numbers of size 1 from each other and leaves one of size s. From s^2 = u on, more than half of its digits are lost. The
// cosine itself is computed in double, with U = 2^-52: its angle has an error of U / s^2, which comes to half of double's
// digits at s^2 = sqrt(U).
OTFACE_HOST_DEVICE inline double least_distance_from_one(DType product_dtype) {
  return product_dtype == DType::float64   ? 0x1p-27
         : product_dtype == DType::float32 ? 0x1p-24
         : product_dtype == DType::float16 ? 0x1p-11
                                           : 0x1p-8;
}

OTFACE_HOST_DEVICE inline Angle angle_of_cosine(double cosine) {
  const double c = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;  // NaN stays
  return {c, std::acos(c), std::sqrt((1 - c) * (1 + c))};
}

// Of unit vectors u and v from |u - v|, or for an obtuse angle from |u + v|: it is 2 sin(theta / 2), or 2 sin((pi - theta) / 2).
OTFACE_HOST_DEVICE inline Angle angle_of_chord(double cosine, double chord) {
  const double pi = 3.14159265358979323846;
  const double c = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
  const double half = chord / 2, small = 2 * std::asin(half < 1 ? half : 1);
  return {c, c > 0 ? small : pi - small, chord * std::sqrt(half < 1 ? 1 - half * half : 0)};
}

struct Margined {
  double value;   // margin(cos)
  double slope;   // d margin / d cos
  bool is_steep;  // the slope has a sine in its denominator
};

// With phi = m1 theta + m2: cos phi - m3, and the slope m1 sin(phi) / sin(theta). Beyond phi = pi, where cos phi rises again:
//   fallback: cos - m2 sin(m2) - m3
//   periodic: (-1)^k cos(phi) - 2 k - m3 with k = floor(phi / pi), which falls everywhere
//
// At theta = 0 and pi the slope is infinite, but what it is multiplied by, d cos / dx, is zero: their product is at most
// m1. So sin(theta) counts as 2^-26 at least: where it is smaller, half of the digits of unit vectors' difference are lost.
OTFACE_HOST_DEVICE inline Margined apply_margin(const Margin& m, const Angle& angle) {
  const double pi = 3.14159265358979323846, least_sine = 0x1p-26;
  const double c = angle.cosine;
  if (m.easy && c <= 0) return {c, 1, false};
  if (m.m1 == 1 && m.m2 == 0) return {c - m.m3, 1, false};
  const double phi = m.m1 * angle.theta + m.m2;
  if (m.beyond_pi == BeyondPi::fallback && phi > pi) return {c - m.m2 * std::sin(m.m2) - m.m3, 1, false};
  double sign = 1, shift = 0;
  if (m.beyond_pi == BeyondPi::periodic) {
    const double k = std::floor(phi / pi);
    sign = std::fmod(k, 2.0) == 0 ? 1 : -1;
    shift = 2 * k;
  }
  const double value = sign * std::cos(phi) - shift - m.m3;
  if (m.straight_through) return {value, 1, false};
  const double sine = angle.sine > least_sine ? angle.sine : least_sine;
  return {value, sign * m.m1 * std::sin(phi) / sine, true};
}

// root * 2^exponent, where neither the root nor its square leaves the range of double.
struct Length {
  double root;
  int exponent;
};

// What brings a row of w into the range of the products: w' = w 2^-exponent, which is 0 for all but very long or short
// rows. Of float and bfloat16, products are right to their last digit down to lengths of 2^-126 times 2^24, and 2^30
// times the gradient of a cosine fits beside 2^96; H of float16 has the range of that type.
OTFACE_HOST_DEVICE inline int rescaling_exponent(const Length& length, DType product_dtype) {
  if (!(length.root > 0 && length.root <= 1.7976931348623157e308)) return 0;
  int exponent;
  std::frexp(length.root, &exponent);
  exponent += length.exponent;
  const int most = product_dtype == DType::float64 ? 800 : product_dtype == DType::float16 ? 10 : 96;
  if (exponent >= -most && exponent <= most) return 0;
  return exponent < -1020 ? -1020 : exponent;  // so that 2^-exponent is a double
}

// 1 / |v 2^-exponent|, and 0 for a zero row. Of infinite length: 0, which spoils the products of that row.
OTFACE_HOST_DEVICE inline double inverse_of(const Length& length, int exponent) {
  return length.root == 0 ? 0 : 1 / std::ldexp(length.root, length.exponent - exponent);
}

}  // namespace
}  // namespace otface::margin
