// The host half of common/simt.h: kernels run on the CPU, every CUDA thread as a fiber. How: host_executor.cpp.
//
// Included by common/simt.h only. A kernel's mistake that the executor itself sees (a collective that not all lanes
// reach, a misaligned pack, ...) ends the launch, which returns the report, with the line of the kernel, as its error.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace otface::simt {

using Stream = void*;

using Where = std::source_location;

namespace executor {

enum class Poison { any_type, float_type };

struct Settings {
  uint64_t seed = 0;                          // of the order of blocks, warps and lanes
  Limits limits = {2, 227 << 10, 228 << 10};  // an H200 with two multiprocessors
  int threads_per_multiprocessor = 2048;
  int blocks_per_multiprocessor = 32;
  // Shared memory is filled with words that are NaN as float and as double, signalling as double. They cannot all be
  // signalling as both: with float_type they all are as float, but huge numbers as double.
  Poison poison = Poison::any_type;
  bool trap_invalid = false;  // an invalid operation in a kernel, as with a signalling NaN, raises SIGFPE
  // For tests of the tests: the barrier at this line is left out. "FILE:LINE", the file without directories.
  std::string without_barrier;
};
extern Settings settings;

// The barriers reached so far, as "FILE:LINE".
std::vector<std::string> barriers();

struct Place {
  int thread, block_threads;
  int64_t block, blocks;
  char* shared;
};
extern const Place* here;  // of the lane that runs

enum class Wait : uint8_t { none, shuffle, vote, sync_warp, sync_block, any_in_block, gang_barrier, exited };

// Fills with words that are NaN, as float and as double, and a wild integer.
void poison(void* p, size_t bytes);

uint64_t shuffle(uint64_t bits, int source_lane, Where where);
unsigned vote(bool x, Where where);
void sync_warp(Where where);
void sync_block(Where where);
bool any_in_block(bool x, Where where);
void gang_barrier(unsigned* counter, unsigned blocks, Where where);
void check_alignment(const void* p, Where where);

const char* run(const LaunchShape& shape, void (*body)(void*), void* context);
int64_t resident_blocks(const LaunchShape& shape);

template <class T>
T shuffle_value(T value, int source_lane, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(bits, source_lane, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace executor

inline int thread_index() { return executor::here->thread; }
inline int block_threads() { return executor::here->block_threads; }
inline int64_t block_index() { return executor::here->block; }
inline int64_t grid_blocks() { return executor::here->blocks; }
inline char* shared_memory() { return executor::here->shared; }

inline void sync_block(Where where = Where::current()) { executor::sync_block(where); }
inline void sync_warp(Where where = Where::current()) { executor::sync_warp(where); }

template <class T>
T shuffle(T value, int source_lane, Where where = Where::current()) {
  return executor::shuffle_value(value, source_lane, where);
}
template <class T>
T shuffle_xor(T value, int lane_mask, Where where = Where::current()) {
  return executor::shuffle_value(value, (thread_index() % 32) ^ lane_mask, where);
}
inline unsigned ballot(bool x, Where where = Where::current()) { return executor::vote(x, where); }
inline bool any_in_warp(bool x, Where where = Where::current()) { return executor::vote(x, where) != 0; }
inline bool all_in_warp(bool x, Where where = Where::current()) { return executor::vote(x, where) == full_mask; }
inline bool any_in_block(bool x, Where where = Where::current()) { return executor::any_in_block(x, where); }
inline int opaque(int x) { return x; }
inline void mark(int* flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }
inline void gang_barrier(unsigned* counter, unsigned blocks, Where where = Where::current()) {
  executor::gang_barrier(counter, blocks, where);
}

template <class T>
Pack<T> load_pack(const T* p, Where where = Where::current()) {
  executor::check_alignment(p, where);
  Pack<T> result;
  for (size_t k = 0; k < 16 / sizeof(T); ++k) result.v[k] = p[k];
  return result;
}
template <class T>
void store_pack(T* p, const Pack<T>& x, Where where = Where::current()) {
  executor::check_alignment(p, where);
  for (size_t k = 0; k < 16 / sizeof(T); ++k) p[k] = x.v[k];
}

// The copy is made at once: that nobody reads too early, or writes over what is still to be read, is not seen here.
template <class T>
void start_copy(T* shared, const T* global, Where where = Where::current()) {
  executor::check_alignment(shared, where);
  executor::check_alignment(global, where);
  for (size_t k = 0; k < 16 / sizeof(T); ++k) shared[k] = global[k];
}
inline void end_of_copies() {}
template <int N>
void wait_for_copies() {}

inline float exp2_of(float x) { return std::exp2(x); }
inline double exp2_of(double x) { return std::exp2(x); }
inline double log_of(double x) { return std::log(x); }
inline float quotient(float a, float b) { return a / b; }
inline double quotient(double a, double b) { return a / b; }
inline float half_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);  // infinite or NaN
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f));
}
inline float bfloat_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline uint16_t float_to_half(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u;
  const float size = std::fabs(x);
  if (!(size < 65520.0f)) return static_cast<uint16_t>(sign | (std::isnan(x) ? 0x7fffu : 0x7c00u));
  // In units of the half's last digit, which is worth 2^-24 for all below 2^-14; adding 2^23 rounds them.
  int exponent = 0;
  std::frexp(size, &exponent);
  exponent = size < 0x1p-14f ? -13 : exponent;  // size < 2^exponent
  const float unit = std::ldexp(1.0f, exponent - 11), digits = (size / unit + 0x1p23f) - 0x1p23f;
  // 1024 to 2048 digits, or fewer where the half is subnormal: 1024 stand for the first step of the exponent.
  return static_cast<uint16_t>(sign | static_cast<uint32_t>((exponent + 13) * 1024 + static_cast<int>(digits)));
}
inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline Limits limits() { return executor::settings.limits; }

template <class... P, class... A>
const char* launch(void (*kernel)(P...), const LaunchShape& shape, Stream, const A&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A));
  auto call = [kernel, values = std::tuple<P...>(static_cast<P>(arguments)...)] { std::apply(kernel, values); };
  return executor::run(shape, [](void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
}
template <class... P>
int registers_of(void (*)(P...)) {
  return 0;
}
template <class... P>
int64_t resident_blocks(void (*)(P...), const LaunchShape& shape) {
  return executor::resident_blocks(shape);
}
inline const char* fill_zero(void* p, size_t bytes, Stream) {
  if (bytes != 0) std::memset(p, 0, bytes);
  return "";
}

}  // namespace otface::simt
