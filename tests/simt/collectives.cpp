// What the executor computes and refuses: exits with 1 if anything is wrong. With an argument, without the kernel
// that notes the order of the threads, which is a race.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/simt.h"

namespace otface {
namespace {

using namespace simt;

int mistakes = 0;
void expect(bool right, const char* what, int line) {
  if (right) return;
  std::fprintf(stderr, "collectives.cpp:%d: %s\n", line, what);
  ++mistakes;
}
#define EXPECT(x) expect(x, #x, __LINE__)

constexpr int threads = 96;

template <class T>
__global__ void shuffles(T* out) {  // [2, threads]
  const int t = thread_index();
  const T value = static_cast<T>(1000 + t);
  out[t] = shuffle(value, (t + 5) % 32);
  out[threads + t] = shuffle_xor(value, 9);
}

template <class T>
void test_shuffles() {
  std::vector<T> out(2 * threads);
  EXPECT(*launch(shuffles<T>, {1, threads, 0}, nullptr, out.data()) == 0);
  for (int t = 0; t < threads; ++t) {
    EXPECT(out[t] == static_cast<T>(1000 + t / 32 * 32 + (t + 5) % 32));
    EXPECT(out[threads + t] == static_cast<T>(1000 + (t ^ 9)));
  }
}

__global__ void votes(unsigned* out) {  // [6, threads]
  const int t = thread_index();
  out[t] = ballot(t % 3 == 0);
  out[threads + t] = any_in_warp(t == 40);
  out[2 * threads + t] = all_in_warp(t != 40);
  out[3 * threads + t] = any_in_block(t == 40);
  out[4 * threads + t] = any_in_block(t == threads);
  out[5 * threads + t] = any_in_block(true);
}

void test_votes() {
  std::vector<unsigned> out(6 * threads);
  EXPECT(*launch(votes, {1, threads, 0}, nullptr, out.data()) == 0);
  for (int t = 0; t < threads; ++t) {
    const bool same_warp = t / 32 == 40 / 32;
    EXPECT((out[t] >> (t % 32) & 1) == (t % 3 == 0));
    EXPECT(out[t] == out[t / 32 * 32]);
    EXPECT(out[threads + t] == same_warp);
    EXPECT(out[2 * threads + t] == !same_warp);
    EXPECT(out[3 * threads + t] == 1);
    EXPECT(out[4 * threads + t] == 0);
    EXPECT(out[5 * threads + t] == 1);
  }
}

// Sums over all threads of each gang of two blocks, three times with the same counter; every gang has its own.
__global__ void gang_sums(int* values, unsigned* counters, int* sums) {  // [grid, threads], [grid / 2], [grid, threads]
  const int64_t gang = block_index() / 2, me = block_index() * block_threads() + thread_index();
  for (int k = 0; k < 3; ++k) {
    gang_barrier(counters + gang, 2);
    int sum = 0;
    for (int t = 0; t < 2 * block_threads(); ++t) sum += values[gang * 2 * block_threads() + t];
    gang_barrier(counters + gang, 2);
    values[me] = sums[me] = sum;
  }
}

void test_gangs() {
  const int64_t blocks = 6;
  std::vector<int> values(blocks * threads, 1), sums(blocks * threads);
  std::vector<unsigned> counters(blocks / 2, 0);
  EXPECT(*launch(gang_sums, {blocks, threads, 0, true}, nullptr, values.data(), counters.data(), sums.data()) == 0);
  const int gang = 2 * threads;
  for (const int sum : sums) EXPECT(sum == gang * gang * gang);
  // As on the GPU, where a round of two takes four from the counter.
  for (const unsigned counter : counters) EXPECT(counter == 6 * 4);
}

template <class T>
__global__ void copy_packs(const T* from, T* to) {
  const int k = thread_index() * (16 / static_cast<int>(sizeof(T)));
  store_pack(to + k, load_pack(from + k));
}

template <class T>
void test_packs() {
  alignas(16) T from[32 * 16 / sizeof(T)], to[32 * 16 / sizeof(T)];
  for (T& x : from) x = static_cast<T>(&x - from);
  EXPECT(*launch(copy_packs<T>, {1, 32, 0}, nullptr, &from[0], &to[0]) == 0);
  EXPECT(std::equal(std::begin(from), std::end(from), to));
}

void test_numbers() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float magnitude = exponent == 31 ? (mantissa == 0 ? INFINITY : NAN)
                                           : std::ldexp(static_cast<float>(exponent == 0 ? mantissa : 1024 + mantissa),
                                                        std::max(exponent, 1) - 25);
    const float expected = std::copysign(magnitude, bits >> 15 != 0 ? -1.0f : 1.0f), actual = half_to_float(half);
    EXPECT(std::isnan(expected) ? std::isnan(actual) : std::memcmp(&expected, &actual, sizeof(float)) == 0);
    const float bfloat = bfloat_to_float(half);
    uint32_t back;
    std::memcpy(&back, &bfloat, sizeof(back));
    EXPECT(back == bits << 16);
    if (!std::isnan(actual)) EXPECT(float_to_half(actual) == half);
    if (!std::isnan(bfloat)) EXPECT(float_to_bfloat(bfloat) == half);
  }
  // Between two neighbours: below the middle, the middle, above it.
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const uint16_t low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits + 1),
                   even = (bits & 1) != 0 ? high : low;
    const float middle = (half_to_float(low) + half_to_float(high)) / 2;
    EXPECT(float_to_half(std::nextafter(middle, 0.0f)) == low && float_to_half(std::nextafter(middle, 1e9f)) == high);
    EXPECT(float_to_half(middle) == even && float_to_half(-middle) == (even | 0x8000));
    const float center = (bfloat_to_float(low) + bfloat_to_float(high)) / 2;
    EXPECT(float_to_bfloat(center) == even && float_to_bfloat(-center) == (even | 0x8000));
  }
  EXPECT(float_to_half(65519.9f) == 0x7bff && float_to_half(65520.0f) == 0x7c00 && float_to_half(-INFINITY) == 0xfc00);
  EXPECT(float_to_half(1e-30f) == 0 && float_to_bfloat(3.4e38f) == 0x7f80 && float_to_bfloat(INFINITY) == 0x7f80);
  EXPECT(std::isnan(half_to_float(float_to_half(NAN))) && std::isnan(bfloat_to_float(float_to_bfloat(NAN))));
  EXPECT(exp2_of(-INFINITY) == 0 && exp2_of(3.0f) == 8 && exp2_of(-static_cast<double>(INFINITY)) == 0);
  EXPECT(quotient(1.0f, 4.0f) == 0.25f && quotient(1.0, 8.0) == 0.125 && log_of(1.0) == 0);
}

// The order in which the threads come, over all blocks.
__global__ void note_order(int* order, int* next) {
  order[(*next)++] = static_cast<int>(block_index()) * block_threads() + thread_index();
}

std::vector<int> order_of(uint64_t seed) {
  std::vector<int> order(4 * threads);
  int next = 0;
  executor::settings.seed = seed;
  EXPECT(*launch(note_order, {4, threads, 0}, nullptr, order.data(), &next) == 0);
  EXPECT(next == 4 * threads);
  return order;
}

void test_order() {
  std::vector<int> first = order_of(1);
  EXPECT(first == order_of(1));
  EXPECT(first != order_of(2));
  EXPECT(!std::is_sorted(first.begin(), first.begin() + 32));  // lanes
  std::vector<int> blocks;
  for (int k = 0; k < 4; ++k) blocks.push_back(first[k * threads] / threads);
  std::vector<int> other = order_of(3);
  bool same = true;
  for (int k = 0; k < 4; ++k) same = same && other[k * threads] / threads == blocks[k];
  EXPECT(!same);
  std::sort(first.begin(), first.end());
  for (int k = 0; k < 4 * threads; ++k) EXPECT(first[k] == k);
}

// What the executor fills shared memory with is a NaN for every type, and a wild index.
template <class T>
__global__ void read_shared(int* are_nan) {
  const T x = reinterpret_cast<const T*>(shared_memory())[thread_index()];
  are_nan[thread_index()] = !(x == x);
}
__global__ void read_shared_integers(int* values) {
  values[thread_index()] = reinterpret_cast<const int*>(shared_memory())[thread_index()];
}

void test_shared_memory() {
  std::vector<int> out(threads);
  EXPECT(*launch(read_shared<float>, {1, threads, threads * sizeof(float)}, nullptr, out.data()) == 0);
  EXPECT(std::all_of(out.begin(), out.end(), [](int x) { return x == 1; }));
  EXPECT(*launch(read_shared<double>, {1, threads, threads * sizeof(double)}, nullptr, out.data()) == 0);
  EXPECT(std::all_of(out.begin(), out.end(), [](int x) { return x == 1; }));
  EXPECT(*launch(read_shared_integers, {1, threads, threads * sizeof(int)}, nullptr, out.data()) == 0);
  EXPECT(std::all_of(out.begin(), out.end(), [](int x) { return x > 1 << 30; }));
}

__global__ void nothing() {}

void test_limits() {
  const auto refused = [](const LaunchShape& shape) { return *launch(nothing, shape, nullptr) != 0; };
  const size_t most = static_cast<size_t>(limits().shared_bytes_per_block);
  EXPECT(!refused({0, 32, 0}));
  EXPECT(!refused({1, 1024, most}));
  EXPECT(refused({1, 1025, 0}));
  EXPECT(refused({1, 0, 0}));
  EXPECT(refused({1, 32, most + 1}));
  EXPECT(refused({int64_t{1} << 31, 32, 0}));
  EXPECT(resident_blocks(nothing, {1, 1024, 0}) == 2 * limits().multiprocessors);
  EXPECT(resident_blocks(nothing, {1, 32, most}) == limits().multiprocessors);
  executor::settings.threads_per_multiprocessor = 128;
  EXPECT(resident_blocks(nothing, {1, 64, 0}) == 4);
  EXPECT(!refused({4, 64, 0, true}));
  EXPECT(refused({5, 64, 0, true}));
  EXPECT(!refused({5, 64, 0, false}));
  executor::settings.threads_per_multiprocessor = 2048;
}

__global__ void shuffle_of_half(int* out) {
  out[thread_index()] = thread_index() < 16 ? shuffle(thread_index(), 0) : 0;
}

// After a report the executor is as good as new.
void test_after_report() {
  std::vector<int> out(threads);
  for (int k = 0; k < 3; ++k) {
    EXPECT(*launch(shuffle_of_half, {1, threads, 0}, nullptr, out.data()) != 0);
    test_votes();
  }
}

}  // namespace
}  // namespace otface

int main(int argc, char**) {
  using namespace otface;
  test_shuffles<float>();
  test_shuffles<double>();
  test_shuffles<int>();
  test_shuffles<unsigned>();
  test_shuffles<int64_t>();
  test_votes();
  test_gangs();
  test_packs<float>();
  test_packs<double>();
  test_packs<uint16_t>();
  test_numbers();
  if (argc == 1) test_order();
  test_shared_memory();
  test_limits();
  test_after_report();
  return mistakes == 0 ? 0 : 1;
}
