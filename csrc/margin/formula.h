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

struct Margined {
  double value;  // margin(cos)
  double slope;  // d margin / d cos
};

// With phi = m1 theta + m2: cos phi - m3, and the slope m1 sin(phi) / sin(theta). Beyond phi = pi, where cos phi rises again:
//   fallback: cos - m2 sin(m2) - m3
//   periodic: (-1)^k cos(phi) - 2 k - m3 with k = floor(phi / pi), which falls everywhere
//
// At theta = 0 and pi the slope is infinite, but what it is multiplied by, d cos / dx, is zero: their product is at most
// m1. So sin(theta) counts as `least_sine` at least: where it is smaller, d cos / dx is lost in rounding.
OTFACE_HOST_DEVICE inline Margined apply_margin(const Margin& m, double cosine, double least_sine) {
  const double pi = 3.14159265358979323846;
  const double c = cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;  // NaN stays
  if (m.easy && c <= 0) return {c, 1};
  if (m.m1 == 1 && m.m2 == 0) return {c - m.m3, 1};
  const double phi = m.m1 * std::acos(c) + m.m2, sine = std::sqrt((1 - c) * (1 + c));
  if (m.beyond_pi == BeyondPi::fallback && phi > pi) return {c - m.m2 * std::sin(m.m2) - m.m3, 1};
  double sign = 1, shift = 0;
  if (m.beyond_pi == BeyondPi::periodic) {
    const double k = std::floor(phi / pi);
    sign = std::fmod(k, 2.0) == 0 ? 1 : -1;
    shift = 2 * k;
  }
  const double slope = m.straight_through ? 1 : sign * m.m1 * std::sin(phi) / (sine > least_sine ? sine : least_sine);
  return {sign * std::cos(phi) - shift - m.m3, slope};
}

}  // namespace
}  // namespace otface::margin
