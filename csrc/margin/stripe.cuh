// What the margin kernels share: element types, and stripes of a row in the registers of a warp.
//
// A warp works on one row, and takes it a stripe at a time. A lane owns groups of columns that lie together, so that it
// can load and store 16 bytes at once:
//
//   stripe    [lane 0: G columns][lane 1]..[lane 31] [lane 0][lane 1]..[lane 31] ..      P times
//
// Where the row is not aligned to 16 bytes, or ends within a group, the same lanes take the same columns one by one:
// the order of a sum, and so its bits, do not depend on where a row lies.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/simt.h"
#include "margin/params.h"

namespace otface::margin {

constexpr int kThreads = 256, kRowsPerBlock = kThreads / 32;  // a warp per row
// That the registers must suffice for: so many warps hide the latency of the memory. More of floats would spill.
template <class T>
constexpr int kBlocksPerMultiprocessor = sizeof(T) == 8 ? 2 : 3;
constexpr double kLog2OfE = 1.4426950408889634074;
constexpr double kInfinity = __builtin_huge_val();
constexpr double kNaN = __builtin_nan("");

// How a type lies in memory, and the conversion to and from Real.
template <DType dtype>
struct Element;
template <>
struct Element<DType::float32> {
  using Stored = float;
  __device__ __forceinline__ static float read(float x) { return x; }
  __device__ __forceinline__ static float rounded(float x) { return x; }
};
template <>
struct Element<DType::float64> {
  using Stored = double;
  __device__ __forceinline__ static double read(double x) { return x; }
  __device__ __forceinline__ static double rounded(double x) { return x; }
};
template <>
struct Element<DType::float16> {
  using Stored = uint16_t;
  __device__ __forceinline__ static float read(uint16_t x) { return simt::half_to_float(x); }
  __device__ __forceinline__ static uint16_t rounded(float x) { return simt::float_to_half(x); }
};
template <>
struct Element<DType::bfloat16> {
  using Stored = uint16_t;
  __device__ __forceinline__ static float read(uint16_t x) { return simt::bfloat_to_float(x); }
  __device__ __forceinline__ static uint16_t rounded(float x) { return simt::float_to_bfloat(x); }
};

template <class T>
struct RealType;
template <>
struct RealType<float> {
  static constexpr DType dtype = DType::float32;
};
template <>
struct RealType<double> {
  static constexpr DType dtype = DType::float64;
};

// Calls launch(Element<dtype>()) for a type that goes with T.
template <class T, class Launch>
const char* with_element(DType dtype, Launch launch) {
  if constexpr (sizeof(T) == 8) {
    if (dtype == DType::float64) return launch(Element<DType::float64>());
  } else {
    if (dtype == DType::float32) return launch(Element<DType::float32>());
    if (dtype == DType::float16) return launch(Element<DType::float16>());
    if (dtype == DType::bfloat16) return launch(Element<DType::bfloat16>());
  }
  return "float64 goes with float64 alone";
}

inline int64_t blocks_of(int64_t rows) { return (rows + kRowsPerBlock - 1) / kRowsPerBlock; }

__device__ __forceinline__ int lane_index() { return simt::thread_index() % 32; }
__device__ __forceinline__ int warp_index() { return simt::thread_index() / 32; }

// Each lane gets the same bits: at every level both partners add the same two numbers.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) x += simt::shuffle_xor(x, bit);
  return x;
}
// The largest of what is not NaN.
template <class T>
__device__ __forceinline__ T warp_most(T x) {
#pragma unroll
  for (int bit = 16; bit > 0; bit /= 2) {
    const T other = simt::shuffle_xor(x, bit);
    x = other > x ? other : x;
  }
  return x;
}

// `per_lane` columns of each lane, as type T; `narrowest` is the smallest element that is loaded or stored, in bytes.
template <class T, int per_lane, int narrowest>
struct Stripe {
  static constexpr int group = 16 / narrowest, groups = per_lane / group;
  static_assert(groups * group == per_lane);
  static constexpr int columns = 32 * per_lane;

  T v[groups][group];

  // Of the stripe, the column of a lane's first entry in a group.
  __device__ __forceinline__ static int column(int q) { return (q * 32 + lane_index()) * group; }

  // From p, where the row has `count` columns left; beyond them, `otherwise`.
  template <class E>
  __device__ __forceinline__ void load(E, const typename E::Stored* p, int64_t count, T otherwise) {
    using Stored = typename E::Stored;
    constexpr int pack = 16 / sizeof(Stored);
    if (has_whole_groups(p, count)) {
#pragma unroll
      for (int q = 0; q < groups; ++q) {
        const int j = column(q);
#pragma unroll
        for (int k = 0; k < group; ++k) v[q][k] = otherwise;
        if (j < count) {
#pragma unroll
          for (int part = 0; part < group; part += pack) {
            const simt::Pack<Stored> x = simt::load_pack(p + j + part);
#pragma unroll
            for (int k = 0; k < pack; ++k) v[q][part + k] = E::read(x.v[k]);
          }
        }
      }
    } else {
      load_one_by_one(E(), p, 1, count, otherwise);
    }
  }

  template <class E>
  __device__ __forceinline__ void load_one_by_one(E, const typename E::Stored* p, int64_t stride, int64_t count,
                                                  T otherwise) {
#pragma unroll
    for (int q = 0; q < groups; ++q) {
#pragma unroll
      for (int k = 0; k < group; ++k) {
        const int j = column(q) + k;
        v[q][k] = j < count ? T(E::read(p[j * stride])) : otherwise;
      }
    }
  }

  template <class E>
  __device__ __forceinline__ void store(E, typename E::Stored* p, int64_t count) const {
    using Stored = typename E::Stored;
    constexpr int pack = 16 / sizeof(Stored);
    if (has_whole_groups(p, count)) {
#pragma unroll
      for (int q = 0; q < groups; ++q) {
        const int j = column(q);
        if (j < count) {
#pragma unroll
          for (int part = 0; part < group; part += pack) {
            simt::Pack<Stored> x;
#pragma unroll
            for (int k = 0; k < pack; ++k) x.v[k] = E::rounded(v[q][part + k]);
            simt::store_pack(p + j + part, x);
          }
        }
      }
    } else {
#pragma unroll
      for (int q = 0; q < groups; ++q) {
#pragma unroll
        for (int k = 0; k < group; ++k) {
          const int j = column(q) + k;
          if (j < count) p[j] = E::rounded(v[q][k]);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ static bool has_whole_groups(const void* p, int64_t count) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (count >= columns || count % group == 0);
  }
};

// In the same order wherever it is needed, so that the bits are the same.
template <class T>
__device__ __forceinline__ T cosine_of(T product, T inverse_norm_x, T inverse_norm_w) {
  return product * inverse_norm_w * inverse_norm_x;
}

// The target's place after `begin`, of 2^30 columns; -1 if it is not there, or if there is none.
__device__ __forceinline__ int place_of_target(const Row& row, int64_t begin) {
  const int64_t place = static_cast<int64_t>(row.target) - begin;
  return row.target >= 0 && place >= 0 && place < (1 << 30) ? static_cast<int>(place) : -1;
}

}  // namespace otface::margin
