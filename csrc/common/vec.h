// Vectors of the instruction set that the including file is compiled for, with the few functions the kernels need.
//
// Written with the vector types of GCC and Clang, not with intrinsics: the width is the only difference between the
// instruction sets. Everything lives in an anonymous namespace, so that code compiled for AVX-512 can never be picked
// by the linker for a machine without it. Include standard headers before the target pragma (see begin_avx512.h).
#pragma once

#ifndef OTFACE_VEC_BYTES
#error "define OTFACE_VEC_BYTES (16, 32 or 64) before including vec.h"
#endif

#include <cstdint>
#include <cstring>

namespace otface {
namespace {

#define OTFACE_INLINE inline __attribute__((always_inline))

// Before a loop over registers: GCC by itself leaves an array of more than 16 vectors in memory.
#if defined(__clang__)
#define OTFACE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define OTFACE_UNROLL _Pragma("GCC unroll 8")
#endif

template <class T>
inline constexpr int lanes = OTFACE_VEC_BYTES / static_cast<int>(sizeof(T));

template <class T, int Bytes = OTFACE_VEC_BYTES>
struct VecType {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <class T>
using Vec = typename VecType<T>::type;
template <class T>
using Four = typename VecType<T, 4 * sizeof(T)>::type;  // four rows at a time, whatever the width of Vec

template <class V, class T>
OTFACE_INLINE V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class T>
OTFACE_INLINE void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
template <class V, class T>
OTFACE_INLINE V broadcast(T x) {
  return x - V{};  // folds to one broadcast: x - 0 is x, the sign of zero included
}

template <class T>
OTFACE_INLINE Vec<T> lane_numbers() {  // {0, 1, 2, ...}
  Vec<T> v;
  for (int k = 0; k < lanes<T>; ++k) v[k] = static_cast<T>(k);
  return v;
}

template <class V>
OTFACE_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define OTFACE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef OTFACE_SHUFFLE  // GCC before 12
#define OTFACE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) == (a)){__VA_ARGS__})
#endif

template <class T>
OTFACE_INLINE Four<T> low_four(Vec<T> v) {
  Four<T> out;
  std::memcpy(&out, &v, sizeof(out));
  return out;
}

// The lanes of a, of b, of c and of d, each combined into one value by `op`. The order is fixed by the width alone.
template <class Op>
OTFACE_INLINE Four<float> reduce_lanes(Op op, Vec<float> a, Vec<float> b, Vec<float> c, Vec<float> d) {
#if OTFACE_VEC_BYTES == 64
  const Vec<float> ab = op(OTFACE_SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29),
                           OTFACE_SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31));
  const Vec<float> cd = op(OTFACE_SHUFFLE(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29),
                           OTFACE_SHUFFLE(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31));
  Vec<float> abcd = op(OTFACE_SHUFFLE(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                       OTFACE_SHUFFLE(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  abcd = op(abcd, OTFACE_SHUFFLE(abcd, abcd, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  abcd = op(abcd, OTFACE_SHUFFLE(abcd, abcd, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
#elif OTFACE_VEC_BYTES == 32
  const Vec<float> ab =
      op(OTFACE_SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13), OTFACE_SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15));
  const Vec<float> cd =
      op(OTFACE_SHUFFLE(c, d, 0, 8, 1, 9, 4, 12, 5, 13), OTFACE_SHUFFLE(c, d, 2, 10, 3, 11, 6, 14, 7, 15));
  Vec<float> abcd =
      op(OTFACE_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13), OTFACE_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15));
  abcd = op(abcd, OTFACE_SHUFFLE(abcd, abcd, 4, 5, 6, 7, 0, 1, 2, 3));
#else
  const Vec<float> ab = op(OTFACE_SHUFFLE(a, b, 0, 4, 1, 5), OTFACE_SHUFFLE(a, b, 2, 6, 3, 7));
  const Vec<float> cd = op(OTFACE_SHUFFLE(c, d, 0, 4, 1, 5), OTFACE_SHUFFLE(c, d, 2, 6, 3, 7));
  const Vec<float> abcd = op(OTFACE_SHUFFLE(ab, cd, 0, 1, 4, 5), OTFACE_SHUFFLE(ab, cd, 2, 3, 6, 7));
#endif
  return low_four<float>(abcd);
}

template <class Op>
OTFACE_INLINE Four<double> reduce_lanes(Op op, Vec<double> a, Vec<double> b, Vec<double> c, Vec<double> d) {
#if OTFACE_VEC_BYTES == 64
  const Vec<double> ab =
      op(OTFACE_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14), OTFACE_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15));
  const Vec<double> cd =
      op(OTFACE_SHUFFLE(c, d, 0, 8, 2, 10, 4, 12, 6, 14), OTFACE_SHUFFLE(c, d, 1, 9, 3, 11, 5, 13, 7, 15));
  Vec<double> abcd =
      op(OTFACE_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13), OTFACE_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15));
  abcd = op(abcd, OTFACE_SHUFFLE(abcd, abcd, 4, 5, 6, 7, 0, 1, 2, 3));
  return low_four<double>(abcd);
#elif OTFACE_VEC_BYTES == 32
  const Vec<double> ab = op(OTFACE_SHUFFLE(a, b, 0, 4, 2, 6), OTFACE_SHUFFLE(a, b, 1, 5, 3, 7));
  const Vec<double> cd = op(OTFACE_SHUFFLE(c, d, 0, 4, 2, 6), OTFACE_SHUFFLE(c, d, 1, 5, 3, 7));
  return op(OTFACE_SHUFFLE(ab, cd, 0, 1, 4, 5), OTFACE_SHUFFLE(ab, cd, 2, 3, 6, 7));
#else
  const Vec<double> ab = op(OTFACE_SHUFFLE(a, b, 0, 2), OTFACE_SHUFFLE(a, b, 1, 3));
  const Vec<double> cd = op(OTFACE_SHUFFLE(c, d, 0, 2), OTFACE_SHUFFLE(c, d, 1, 3));
  return Four<double>{ab[0], ab[1], cd[0], cd[1]};
#endif
}

template <class T>
OTFACE_INLINE Four<double> widen(Four<T> v) {
  return __builtin_convertvector(v, Four<double>);
}

// {sum of the lanes of a, of b, of c, of d}
template <class V>
OTFACE_INLINE auto sum_lanes(V a, V b, V c, V d) {
  return reduce_lanes([](V x, V y) __attribute__((always_inline)) { return x + y; }, a, b, c, d);
}
template <class V>
OTFACE_INLINE auto sum_lanes(V v) {
  return sum_lanes(v, v, v, v)[0];
}
// {least lane of a, of b, of c, of d}
template <class V>
OTFACE_INLINE auto least_lanes(V a, V b, V c, V d) {
  return reduce_lanes([](V x, V y) __attribute__((always_inline)) { return vmin(x, y); }, a, b, c, d);
}
template <class V>
OTFACE_INLINE auto least_lane(V v) {
  return least_lanes(v, v, v, v)[0];
}

// Whether any lane of a comparison's result is set.
template <class Mask>
OTFACE_INLINE bool any(Mask mask) {
  uint64_t words[sizeof(Mask) / 8], all = 0;
  std::memcpy(words, &mask, sizeof(mask));
  for (const uint64_t word : words) all |= word;
  return all != 0;
}

// 2^x to about 1 unit in the last place: x = n + f with n an integer and |f| <= 1/2; n goes into the exponent bits. 0 where
// the result would not be a normal number; x is cut off at `cap`.
template <class T>
struct Exp2Range;
template <>
struct Exp2Range<float> {
  static constexpr float least = -125.0f, cap = 115.0f;
};
template <>
struct Exp2Range<double> {
  static constexpr double least = -1021.0, cap = 865.0;
};
inline constexpr double log2_of_e = 1.4426950408889634074;

OTFACE_INLINE Vec<float> vexp2(Vec<float> x) {
  using I = decltype(x == x);
  const I underflow = x < Exp2Range<float>::least;
  x = vmin(x, broadcast<Vec<float>>(Exp2Range<float>::cap));
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const Vec<float> shifted = x + round_to_int;
  const Vec<float> f = x - (shifted - round_to_int);
  // Least largest relative error for the form 1 + f q(f): 2e-9, and 1.6e-8 with the coefficients rounded.
  Vec<float> p = f * 1.5353361959569156e-4f + 1.3398875016719103e-3f;
  p = p * f + 9.61843691766262e-3f;
  p = p * f + 5.5503323674201965e-2f;
  p = p * f + 2.4022647738456726e-1f;
  p = p * f + 6.931471824645996e-1f;
  p = p * f + 1.0f;
  VecType<uint32_t>::type integer, bits;  // unsigned: where the result is cut to 0, the sum may wrap around
  std::memcpy(&integer, &shifted, sizeof(integer));
  std::memcpy(&bits, &p, sizeof(bits));
  bits += integer << 23;  // what else is in `shifted` is shifted out
  Vec<float> result;
  std::memcpy(&result, &bits, sizeof(result));
  return underflow ? Vec<float>{} : result;
}

OTFACE_INLINE Vec<double> vexp2(Vec<double> x) {
  using I = decltype(x == x);
  const I underflow = x < Exp2Range<double>::least;
  x = vmin(x, broadcast<Vec<double>>(Exp2Range<double>::cap));
  const double round_to_int = 6755399441055744.0;  // 1.5 * 2^52
  const Vec<double> shifted = x + round_to_int;
  const Vec<double> r = (x - (shifted - round_to_int)) * 6.9314718055994530942e-1;
  // Taylor's series of exp to r^13 / 13!: the rest is below 5e-18 for |r| <= log(2) / 2.
  Vec<double> p = r * 1.6059043836821614599e-10 + 2.0876756987868098979e-9;
  p = p * r + 2.5052108385441718775e-8;
  p = p * r + 2.7557319223985890653e-7;
  p = p * r + 2.7557319223985890653e-6;
  p = p * r + 2.4801587301587301587e-5;
  p = p * r + 1.9841269841269841270e-4;
  p = p * r + 1.3888888888888888889e-3;
  p = p * r + 8.3333333333333333333e-3;
  p = p * r + 4.1666666666666666667e-2;
  p = p * r + 1.6666666666666666667e-1;
  p = p * r + 0.5;
  p = (p * r) * r + (r + 1.0);
  VecType<uint64_t>::type integer, bits;
  std::memcpy(&integer, &shifted, sizeof(integer));
  std::memcpy(&bits, &p, sizeof(bits));
  bits += integer << 52;
  Vec<double> result;
  std::memcpy(&result, &bits, sizeof(result));
  return underflow ? Vec<double>{} : result;
}

// log(x) of positive normal numbers: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 atanh((m - 1) / (m + 1)).
OTFACE_INLINE Vec<double> vlog(Vec<double> x) {
  using I = decltype(x == x);
  const int64_t sqrt_half = 0x3fe6a09e667f3bcdLL;
  I bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const I exponent = (bits - sqrt_half) >> 52;
  bits -= exponent << 52;
  Vec<double> m;
  std::memcpy(&m, &bits, sizeof(m));
  const double shift_to_int = 6755399441055744.0;  // 1.5 * 2^52: integer to double by adding it as bits
  int64_t shift_bits;
  std::memcpy(&shift_bits, &shift_to_int, sizeof(shift_bits));
  const I exponent_bits = exponent + shift_bits;
  Vec<double> e;
  std::memcpy(&e, &exponent_bits, sizeof(e));
  e -= shift_to_int;
  const Vec<double> s = (m - 1.0) / (m + 1.0), z = s * s;
  // z <= 0.0295, so the series is cut after z^10 / 21 at a relative error of 1e-17.
  Vec<double> p = z * (2.0 / 21) + 2.0 / 19;
  p = p * z + 2.0 / 17;
  p = p * z + 2.0 / 15;
  p = p * z + 2.0 / 13;
  p = p * z + 2.0 / 11;
  p = p * z + 2.0 / 9;
  p = p * z + 2.0 / 7;
  p = p * z + 2.0 / 5;
  p = p * z + 2.0 / 3;
  return e * 6.93147180369123816490e-01 + (s * 2.0 + (e * 1.90821492927058770002e-10 + (p * z) * s));
}

}  // namespace
}  // namespace otface
