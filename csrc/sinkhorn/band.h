// Numbers that decide when a solve leaves multiply-adds for one iteration in the log domain, and when it has converged; the
// same on every device.
#pragma once

namespace otface::sinkhorn {

// Row and column sums stay within exp(-band) .. exp(band); outside, the iteration is done again as a log-sum-exp. Entries
// of K that underflow are then below exp(2 band) times the smallest normal number, against sums of 1.
template <class T>
struct Band;
template <>
struct Band<float> {
  static constexpr float low = 2.0611536e-9f, high = 4.8516520e8f;  // exp(-20), exp(20)
  static constexpr float least_normal = 1.17549435e-38f;
};
template <>
struct Band<double> {
  static constexpr double low = 1.3838965e-87, high = 7.2259738e86;  // exp(-200), exp(200)
  static constexpr double least_normal = 2.2250738585072014e-308;
};

// Without a tolerance, a problem has converged if rounding alone explains its error: error^2 <= value (n + m), where value
// is (4 epsilon)^2. Row and column sums are rounded m + n times, by half an epsilon at most, mostly up and down in turn:
// sqrt(n + m) / 2 epsilon, and the error compares two sweeps. The other factor of 4 is room for products and quotients.
template <class T>
struct RoundingLevel;
template <>
struct RoundingLevel<float> {
  static constexpr double value = 0x1p-42;
};
template <>
struct RoundingLevel<double> {
  static constexpr double value = 0x1p-100;
};

// 2^x is cut off at this x: an entry of K without weight in its row may be as large as it likes, but must stay finite.
template <class T>
struct ExponentCap;
template <>
struct ExponentCap<float> {
  static constexpr float value = 115.0f;
};
template <>
struct ExponentCap<double> {
  static constexpr double value = 865.0;
};

// Beyond these, numbers of T do not suffice for what is computed from eps and from a mass.
template <class T>
struct Extremes;
template <>
struct Extremes<float> {
  static constexpr double least_eps = 0x1p-120, most_mass = 0x1p64, least_mass = 0x1p-64;
  static constexpr float small_cost = 0x1p-64f;  // a factor with which sums of costs stay finite
};
template <>
struct Extremes<double> {
  static constexpr double least_eps = 0x1p-1016, most_mass = 0x1p512, least_mass = 0x1p-512;
  static constexpr double small_cost = 0x1p-512;
};

}  // namespace otface::sinkhorn
