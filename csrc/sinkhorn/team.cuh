// What every device kernel of the family shares: the vocabulary of teams and slots, memory that is laid out by one piece
// of code for host and device, and one problem as its team sees it.
//
// A *team* of threads solves one problem. The algorithms (forward.cuh, unrolled.cuh, implicit.cuh) are written once, on a
// matrix K that hides who the team is and where K lies:
//
//   RegisterMatrix   16 or 32 lanes of one warp        K in registers          (register_matrix.cuh)
//   MemoryMatrix     one block                         K in shared memory      (memory_matrix.cuh)
//   MemoryMatrix     a gang of blocks of one launch    K in global memory
//
// Rows and columns have an owner in the team, who reads and writes its entries of a vector. Two teams may share a warp, so
// that collectives must be reached by both: code is written for all teams of the *domain* (threads that meet at the same
// barriers) together, and a `mask` says whether a team takes part.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/simt.h"
#include "sinkhorn/band.h"
#include "sinkhorn/params.h"

#ifdef __CUDACC__
#define OTFACE_UNROLL _Pragma("unroll")
#define OTFACE_UNROLL_BY_4 _Pragma("unroll 4")
#define OTFACE_UNROLL_BY_8 _Pragma("unroll 8")
#else
#define OTFACE_UNROLL
#define OTFACE_UNROLL_BY_4
#define OTFACE_UNROLL_BY_8
#endif

// What holds registers of a tile must end up in one function with it: a tile that is passed to a call lies in memory.
#define OTFACE_DEVICE __device__ __forceinline__

namespace otface::sinkhorn {

// One owned row or column.
struct Slot {
  int k;        // its place in a vector of owned entries
  int i;        // its index in the matrix
  bool keeps;   // this thread stores it in a vector of owned entries
  bool counts;  // this thread, alone in the team, writes it to memory and adds it to a sum
};

// Memory handed out piece by piece. The host runs the same constructors on a null base to learn how much is needed.
struct Arena {
  char* base;
  size_t used = 0;

  template <class U>
  __host__ __device__ U* take(int64_t count) {
    U* p = reinterpret_cast<U*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(U) + 15) / 16 * 16;
    return p;
  }
};

constexpr double kLog2OfE = 1.4426950408889634074;
constexpr double kInfinity = __builtin_huge_val();
constexpr double kNaN = __builtin_nan("");

template <class T>
struct LargestOf;
template <>
struct LargestOf<float> {
  static constexpr float value = 3.4028234663852886e38f;
};
template <>
struct LargestOf<double> {
  static constexpr double value = 1.7976931348623157e308;
};

template <class T>
OTFACE_DEVICE bool is_finite(T x) {
  return x - x == T(0);
}
template <class T>
OTFACE_DEVICE bool within_band(T x) {
  return x >= Band<T>::low && x <= Band<T>::high;
}
template <class T>
__host__ OTFACE_DEVICE T least_of(T a, T b) {
  return a < b ? a : b;
}

// 2^x, finite for any x that is not NaN.
template <class T>
OTFACE_DEVICE T capped_exp2(T x) {
  return simt::exp2_of(least_of(x, ExponentCap<T>::value));
}

// x = high + low
OTFACE_DEVICE void split(double x, float& high, float& low) {
  high = static_cast<float>(x);
  low = static_cast<float>(x - static_cast<double>(high));
}
OTFACE_DEVICE void split(double x, double& high, double& low) {
  high = x;
  low = 0;
}

// (f + g) - c to the rounding of the result, however large f, g and c are against it: the rounding error of the first sum is
// computed and added again (Knuth's two-sum), the second difference is exact where it is small. In floats, since
// double arithmetic and conversions run at a fraction of the rate, on most devices a very small one.
OTFACE_DEVICE float exact_difference(float f_high, float f_low, float g_high, float g_low, float c) {
  const float sum = f_high + g_high, of_g = sum - f_high;
  const float error = (f_high - (sum - of_g)) + (g_high - of_g);
  return (sum - c) + (error + (f_low + g_low));
}
OTFACE_DEVICE double exact_difference(double f, double, double g, double, double c) { return (f + g) - c; }

template <class T>
OTFACE_DEVICE T load_as(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::float32: return static_cast<T>(static_cast<const float*>(data)[offset]);
    case DType::float64: return static_cast<T>(static_cast<const double*>(data)[offset]);
    case DType::float16: return static_cast<T>(simt::half_to_float(static_cast<const uint16_t*>(data)[offset]));
    default: return static_cast<T>(simt::bfloat_to_float(static_cast<const uint16_t*>(data)[offset]));
  }
}

// One problem of the batch, cut to its valid size. It lies in shared memory, once per team and block: its fields are rarely
// needed, and would take registers from K.
struct Problem {
  int64_t index;  // in the batch
  bool exists;    // false: this team has nothing to do, and writes nothing
  bool valid;     // false: eps, weights or lengths cannot be used, or are extreme; the outputs are NaN
  bool has_zero_in_b;
  int rows, cols;
  double eps;
  double to_exponent;  // log2(e) / eps, finite also for the least eps: a difference of 0 stays 0
  double mass_a, mass_b;

  OTFACE_DEVICE void read(const Problems& all, int64_t batch_index) {
    exists = batch_index < all.batch;
    index = exists ? batch_index : all.batch - 1;
    const bool rows_ok = read_length(all.row_lengths, all.n, rows);
    const bool cols_ok = read_length(all.col_lengths, all.m, cols);
    eps = all.eps[index * all.eps_stride];
    valid = exists && rows_ok && cols_ok && eps > 0 && is_finite(eps);
    if (!valid) eps = 1;
    to_exponent = least_of(kLog2OfE / eps, LargestOf<double>::value);
  }

 private:
  OTFACE_DEVICE bool read_length(const int64_t* lengths, int64_t size, int& length) const {
    const int64_t given = lengths == nullptr ? size : lengths[index];
    const bool fits = given >= 1 && given <= size;
    length = static_cast<int>(fits ? given : size);
    return fits;
  }
};

// Entry i of the weights of one problem; zero past the end.
template <class T>
OTFACE_DEVICE T read_weight(const Problems& all, const WeightsView& view, int64_t index, int i, int count) {
  if (i >= count) return 0;
  if (view.data == nullptr) return static_cast<T>(1.0 / static_cast<double>(count));
  const DType dtype = all.is_double ? DType::float64 : DType::float32;
  return load_as<T>(view.data, dtype, index * view.batch_stride + i * view.stride);
}

}  // namespace otface::sinkhorn
