// Small kernels with one mistake each, and without it: what the executor and the sanitizers must report, and must not.
//
// A comment "report NAME" stands at each line that the report of kernel NAME must name. Usage:
// wrong_kernels NAME right|wrong|FILE:LINE SEED...; FILE:LINE is the right kernel without the barrier there. Prints the
// executor's report.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>

#include "common/simt.h"

namespace otface {
namespace {

using namespace simt;

template <class T>
T* shared_array() {
  return reinterpret_cast<T*>(shared_memory());
}

struct Params {
  float* x;            // [blocks, threads]
  const float* table;  // [threads]

  unsigned* counter;
};

__device__ float* element(const Params& p, int thread) { return p.x + block_index() * block_threads() + thread; }

// --- Seen by the thread sanitizer

template <bool right>
__global__ void missing_barrier(Params p) {
  const int t = thread_index();
  float* s = shared_array<float>();
  s[t] = *element(p, t);  // report missing_barrier
  if constexpr (right) sync_block();
  *element(p, t) = s[(t + 1) % block_threads()];  // report missing_barrier
}

template <bool right>
__global__ void missing_barrier_after_read(Params p) {
  const int t = thread_index();
  float* s = shared_array<float>();
  s[t] = *element(p, t);
  sync_block();
  for (int k = 0; k < 3; ++k) {
    const float next = s[(t + 1) % block_threads()];  // report missing_barrier_after_read
    if constexpr (right) sync_block();
    s[t] = next;  // report missing_barrier_after_read
    sync_block();
  }
  *element(p, t) = s[t];
}

// Within a warp a shuffle lets all lanes arrive, but orders nothing.
template <bool right>
__global__ void missing_warp_barrier(Params p) {
  const int t = thread_index();
  float* s = shared_array<float>();
  s[t] = *element(p, t);  // report missing_warp_barrier
  if constexpr (right) sync_warp();
  const float other = shuffle_xor(*element(p, t), 1);
  *element(p, t) = other + s[t ^ 1];  // report missing_warp_barrier
}

// A barrier of a warp does not order two warps.
template <bool right>
__global__ void warp_barrier_between_warps(Params p) {
  const int t = thread_index();
  float* s = shared_array<float>();
  s[t] = *element(p, t);  // report warp_barrier_between_warps
  if constexpr (right) {
    sync_block();
  } else {
    sync_warp();
  }
  *element(p, t) = s[t ^ 32];  // report warp_barrier_between_warps
}

template <bool right>
__global__ void race_of_blocks(Params p) {
  const int t = thread_index();
  const bool last = block_index() + 1 == grid_blocks();
  const float next = right || last ? 0 : *element(p, t + block_threads());  // report race_of_blocks
  *element(p, t) = next + 1;                                                // report race_of_blocks
}

template <bool right>
__global__ void missing_gang_barrier(Params p) {
  const int t = thread_index();
  const bool last = block_index() + 1 == grid_blocks();
  for (int k = 0; k < 3; ++k) {
    const float next = last ? 0 : *element(p, t + block_threads());  // report missing_gang_barrier
    if constexpr (right) {
      gang_barrier(p.counter, static_cast<unsigned>(grid_blocks()));
    } else {
      sync_block();
    }
    *element(p, t) = next + 1;  // report missing_gang_barrier
    gang_barrier(p.counter, static_cast<unsigned>(grid_blocks()));
  }
}

// --- Seen by the executor itself

template <bool right>
__global__ void exit_before_shuffle(Params p) {
  const int t = thread_index();
  if (!right && t == 40) return;
  *element(p, t) = shuffle(*element(p, t), 3);  // report exit_before_shuffle
}

template <bool right>
__global__ void exit_before_barrier(Params p) {
  const int t = thread_index();
  if (!right && t >= 32) return;
  *element(p, t) = 1;
  sync_block();  // report exit_before_barrier
}

template <bool right>
__global__ void partial_mask(Params p) {
  const int t = thread_index();
  float x = *element(p, t);
  if (right || t % 32 < 16) x += shuffle_xor(x, 8);  // report partial_mask
  sync_warp();                                       // report partial_mask
  *element(p, t) = x;
}

template <bool right>
__global__ void parted_collective(Params p) {
  const int t = thread_index();
  const float x = *element(p, t);
  float sum;
  if (right || t % 2 == 0) {
    sum = x + shuffle_xor(x, 1);  // report parted_collective
  } else {
    sum = x - shuffle_xor(x, 1);  // report parted_collective
  }
  *element(p, t) = sum;
}

template <bool right>
__global__ void vote_of_some(Params p) {
  const int t = thread_index();
  bool any = false;
  for (int k = 0; k < (right ? 4 : 1 + t % 4); ++k) any = any_in_warp(k > 2) || any;  // report vote_of_some
  *element(p, t) = any;
}

template <bool right>
__global__ void parted_barrier(Params p) {
  const int t = thread_index();
  if (right || t < 32) {
    sync_block();  // report parted_barrier
  } else {
    sync_block();  // report parted_barrier
  }
  *element(p, t) = any_in_block(t == 7);
}

template <bool right>
__global__ void wrong_source_lane(Params p) {
  const int t = thread_index();
  *element(p, t) = shuffle(*element(p, t), right ? 31 : 32);  // report wrong_source_lane
}

template <bool right>
__global__ void misaligned_pack(Params p) {
  const int t = thread_index();
  if (t % 4 != 0 || t + 4 >= block_threads()) return;
  Pack<float> x = load_pack(element(p, right ? t : t + 1));  // report misaligned_pack
  for (float& value : x.v) value += 1;
  store_pack(element(p, t), x);
}

template <bool right>
__global__ void gang_deadlock(Params p) {
  if (!right && block_index() == 2) return;
  gang_barrier(p.counter, static_cast<unsigned>(grid_blocks()));  // report gang_deadlock
  *element(p, thread_index()) = 1;
}

template <bool right>
__global__ void used_counter(Params p) {  // not zero before the launch, see run()

  gang_barrier(p.counter, static_cast<unsigned>(grid_blocks()));  // report used_counter
  *element(p, thread_index()) = 1;
}

template <bool right>
__global__ void gang_of_ordinary_launch(Params p) {
  if (!right) gang_barrier(p.counter, static_cast<unsigned>(grid_blocks()));  // report gang_of_ordinary_launch
  *element(p, thread_index()) = 1;
}

template <bool right>
__global__ void collective_of_half_a_warp(Params p) {
  *element(p, thread_index()) = ballot(true) == full_mask;  // report collective_of_half_a_warp
}

// --- Seen by the address sanitizer

template <bool right>
__global__ void shared_out_of_bounds(Params p) {
  const int t = thread_index();
  float* s = shared_array<float>();
  s[right ? t : t + 1] = 1;  // report shared_out_of_bounds
  sync_block();
  *element(p, t) = s[t];
}

template <bool right>
__global__ void global_out_of_bounds(Params p) {
  const int t = thread_index();
  *element(p, right ? t : t + 1) = 1;  // report global_out_of_bounds
}

template <bool right>
__global__ void uninitialised_index(Params p) {
  const int t = thread_index();
  int* s = shared_array<int>();
  if (right || t != 5) s[t] = t;
  sync_block();
  *element(p, t) = p.table[s[t ^ 1]];  // report uninitialised_index
}

// A signalling NaN, where invalid operations trap

template <bool right>
__global__ void uninitialised_float(Params p) {
  const int t = thread_index();
  float* s = shared_array<float>();
  if (right || t != 5) s[t] = 1;
  sync_block();
  const float other = s[t ^ 1];
  *element(p, t) = other + 1;  // report uninitialised_float
}

template <bool right>
__global__ void uninitialised_double(Params p) {
  const int t = thread_index();
  double* s = shared_array<double>();
  if (right || t != 5) s[t] = 1;
  sync_block();
  const double other = s[t ^ 1];
  *element(p, t) = static_cast<float>(other * 3);  // report uninitialised_double
}

struct Kernel {
  const char* name;
  void (*right)(Params);
  void (*wrong)(Params);
  LaunchShape shape;
};

#define KERNEL(name) #name, name<true>, name<false>
constexpr size_t shared_bytes = 64 * sizeof(float);
const Kernel kernels[] = {
    {KERNEL(missing_barrier), {2, 64, shared_bytes}},
    {KERNEL(missing_barrier_after_read), {2, 64, shared_bytes}},
    {KERNEL(missing_warp_barrier), {2, 64, shared_bytes}},
    {KERNEL(warp_barrier_between_warps), {2, 64, shared_bytes}},
    {KERNEL(race_of_blocks), {4, 64, 0}},
    {KERNEL(missing_gang_barrier), {4, 64, 0, true}},
    {KERNEL(exit_before_shuffle), {2, 64, 0}},
    {KERNEL(exit_before_barrier), {2, 64, 0}},
    {KERNEL(partial_mask), {2, 64, 0}},
    {KERNEL(parted_collective), {2, 64, 0}},
    {KERNEL(vote_of_some), {2, 64, 0}},
    {KERNEL(parted_barrier), {2, 64, 0}},
    {KERNEL(wrong_source_lane), {2, 64, 0}},
    {KERNEL(misaligned_pack), {2, 64, 0}},
    {KERNEL(gang_deadlock), {4, 64, 0, true}},
    {KERNEL(used_counter), {4, 64, 0, true}},
    {KERNEL(gang_of_ordinary_launch), {2, 64, 0}},
    {KERNEL(collective_of_half_a_warp), {2, 64, 0}},
    {KERNEL(shared_out_of_bounds), {2, 64, shared_bytes}},
    {KERNEL(global_out_of_bounds), {2, 64, 0}},
    {KERNEL(uninitialised_index), {2, 64, shared_bytes}},
    {KERNEL(uninitialised_float), {2, 64, shared_bytes}},
    {KERNEL(uninitialised_double), {2, 64, 2 * shared_bytes}},
};

int run(const Kernel& kernel, bool right, uint64_t seed) {
  LaunchShape shape = kernel.shape;
  const auto is = [&](const char* name) { return std::strcmp(kernel.name, name) == 0; };
  if (!right && is("collective_of_half_a_warp")) shape.threads = 48;

  executor::settings.seed = seed;
  executor::settings.trap_invalid = std::strncmp(kernel.name, "uninitialised_", 14) == 0;
  if (is("uninitialised_float")) executor::settings.poison = executor::Poison::float_type;
  const size_t size = static_cast<size_t>(shape.blocks * shape.threads);
  const auto x = std::make_unique<float[]>(size);
  const auto table = std::make_unique<float[]>(static_cast<size_t>(shape.threads));
  const auto counter = std::make_unique<unsigned>(!right && is("used_counter"));
  for (size_t k = 0; k < size; ++k) x[k] = static_cast<float>(k);
  const Params params{x.get(), table.get(), counter.get()};
  const char* error = launch(right ? kernel.right : kernel.wrong, shape, nullptr, params);

  std::fprintf(stderr, "%s", error);
  return *error == 0 ? 0 : 1;
}

}  // namespace
}  // namespace otface

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  for (const otface::Kernel& kernel : otface::kernels) {
    if (std::strcmp(kernel.name, argv[1]) != 0) continue;
    const bool right = std::strcmp(argv[2], "wrong") != 0;
    if (right && std::strcmp(argv[2], "right") != 0) otface::simt::executor::settings.without_barrier = argv[2];
    for (int k = 3; k < argc; ++k) {
      const int status = otface::run(kernel, right, std::strtoull(argv[k], nullptr, 10));
      if (status != 0) return status;
    }
    return 0;
  }
  return 2;
}
