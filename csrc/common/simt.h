// The only file that includes CUDA: everything a kernel or its launcher may use. The same names are run on the CPU by
// the executor in tests/simt/ when OTFACE_SIMT_HOST is defined, so that every kernel is tested without a GPU.
//
// What a kernel may rely on, and the executor checks: blocks are one-dimensional; shared memory is dynamic only; every
// collective of a warp is reached by all its 32 lanes, and every barrier by all threads of the block, at the same line.
// Only sync_warp, sync_block, any_in_block and gang_barrier order memory accesses; shuffles and votes do not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace otface::simt {

constexpr unsigned full_mask = 0xffffffffu;

template <class T>
struct alignas(16) Pack {
  T v[16 / sizeof(T)];
};

struct Limits {
  int multiprocessors;
  int shared_bytes_per_block;  // the most that a kernel may ask for
  int shared_bytes_per_multiprocessor;
  int64_t workspace_bytes = int64_t{2} << 30;  // that a launch may take, unless one problem alone needs more
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  bool cooperative = false;  // all blocks on the device at once, so that they may wait for one another
};

}  // namespace otface::simt

#ifdef OTFACE_SIMT_HOST

#include "host_executor.h"

#else

#include <cuda_runtime_api.h>

namespace otface::simt {

using Stream = cudaStream_t;

// "" or CUDA's text of the error, which is also taken out of CUDA's own state.
inline const char* error_text(cudaError_t status) {
  if (status == cudaSuccess) return "";
  (void)cudaGetLastError();
  return cudaGetErrorString(status);
}

// Of the current device; all zero without one.
inline Limits limits() {
  Limits result{};
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&result.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&result.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&result.shared_bytes_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                           device);
  }
  (void)cudaGetLastError();
  return result;
}

inline const char* fill_zero(void* p, size_t bytes, Stream stream) {
  return bytes == 0 ? "" : error_text(cudaMemsetAsync(p, 0, bytes, stream));
}

}  // namespace otface::simt

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace otface::simt {

// Where in the source a barrier stands; only the executor knows. A function that wraps barriers takes it on, as they
// do, so that a report names the function's caller: void sync(simt::Where where = simt::Where::current()).
struct Where {
  __host__ __device__ static constexpr Where current() { return {}; }
};

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ int64_t grid_blocks() { return gridDim.x; }

// The block's dynamic shared memory: 16-byte aligned, exactly the bytes asked for at launch.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char otface_shared_memory[];
  return otface_shared_memory;
}

__device__ __forceinline__ void sync_block(Where = Where::current()) { __syncthreads(); }
__device__ __forceinline__ void sync_warp(Where = Where::current()) { __syncwarp(full_mask); }

// T: float, double, int, unsigned or int64_t
template <class T>
__device__ __forceinline__ T shuffle(T value, int source_lane) {
  return __shfl_sync(full_mask, value, source_lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(full_mask, value, lane_mask);
}
__device__ __forceinline__ bool any_in_warp(bool x) { return __any_sync(full_mask, x); }
__device__ __forceinline__ bool all_in_warp(bool x) { return __all_sync(full_mask, x); }
__device__ __forceinline__ unsigned ballot(bool x) { return __ballot_sync(full_mask, x); }
// Also a sync_block.
__device__ __forceinline__ bool any_in_block(bool x, Where = Where::current()) { return __syncthreads_or(x); }

// The `blocks` blocks that share `counter` wait for one another; what any thread of them wrote before is seen by all of
// them after (but for a read through the read-only cache, which const __restrict__ may give: do not use it on what
// other blocks write). The counter is zero before the launch and only ever used here; the launch is cooperative.
//
// A round takes a power of two of the counter, so that it may wrap around: `blocks` arrivals, then the last to arrive
// adds what is left. Nobody waits for that: there is room in the round for those who already arrive for the next one.
__device__ __forceinline__ void gang_barrier(unsigned* counter, unsigned blocks, Where = Where::current()) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned round = 1u << (32 - __clz(2 * blocks - 1));  // >= 2 * blocks
    __threadfence();
    const unsigned ticket = atomicAdd(counter, 1u);
    unsigned place = ticket & (round - 1);
    unsigned start = ticket - place;
    if (place >= blocks) {  // early for the next round
      place -= blocks;
      start += round;
    }
    if (place == blocks - 1) {
      atomicAdd(counter, round - blocks);
    } else {
      unsigned arrived;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(arrived)
                     : "l"(__cvta_generic_to_global(counter))
                     : "memory");
      } while (static_cast<int>(arrived - start) < static_cast<int>(blocks));
    }
    __threadfence();
  }
  __syncthreads();
}

// *flag = 1, where several blocks may do so at the same time.
__device__ __forceinline__ void mark(int* flag) { atomicExch(flag, 1); }

// x, of which the compiler knows nothing: what is computed from it stays behind this line, where it would otherwise be
// taken out of a loop and occupy registers there.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 16 bytes at once; p must be 16-byte aligned. T: float, double or uint16_t
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  const uint4 bits = *reinterpret_cast<const uint4*>(p);
  Pack<T> result;
  memcpy(&result, &bits, sizeof(bits));
  return result;
}
template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& x) {
  uint4 bits;
  memcpy(&bits, &x, sizeof(bits));
  *reinterpret_cast<uint4*>(p) = bits;
}

// 16 bytes from global to shared memory, on their way while the thread goes on. end_of_copies() closes a group of them;
// after wait_for_copies<N>() all but the last N groups of this thread are there, for this thread. Both addresses are
// 16-byte aligned. Before compute capability 8.0 the thread copies by itself.
template <class T>
__device__ __forceinline__ void start_copy(T* shared, const T* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(__cvta_generic_to_global(global))
               : "memory");
#else
  *reinterpret_cast<uint4*>(shared) = *reinterpret_cast<const uint4*>(global);
#endif
}
__device__ __forceinline__ void end_of_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
template <int N>
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
#endif
}

// 2 units in the last place; 0 below 2^-126, where exp2f would take three more instructions for a subnormal.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }
__device__ __forceinline__ double log_of(double x) { return log(x); }
// 2 units in the last place; wrong where b or 1 / b is not a normal number.
__device__ __forceinline__ float quotient(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
}
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }
__device__ __forceinline__ float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ float bfloat_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}
// To the nearest, of two to the even one; beyond the largest, infinite.
__device__ __forceinline__ uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ uint16_t float_to_bfloat(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// Shared memory beyond the 48 KB that every kernel has must be asked for, once per kernel. And where a block takes much of
// it, all of a multiprocessor's memory shall be shared memory, none of it cache, so that as many blocks fit as can.
template <class... P>
cudaError_t allow_shared_memory(void (*kernel)(P...), size_t bytes) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  if (bytes <= 8 * 1024) return cudaSuccess;
  const cudaError_t carved =
      cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (carved != cudaSuccess || bytes <= 48 * 1024) return carved;
  return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// "" or the text of the error. No blocks: nothing is launched.
template <class... P, class... A>
const char* launch(void (*kernel)(P...), const LaunchShape& shape, Stream stream, const A&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A));
  if (shape.blocks == 0) return "";
  if (shape.blocks > INT32_MAX) return "more than 2^31 - 1 blocks";
  const cudaError_t allowed = allow_shared_memory(kernel, shape.shared_bytes);
  if (allowed != cudaSuccess) return error_text(allowed);
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = shape.cooperative ? 1 : 0;
  return error_text(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...));
}

// Registers per thread of the kernel as compiled for the current device; 0 without one.
template <class... P>
int registers_of(void (*kernel)(P...)) {
  cudaFuncAttributes attributes{};
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess)
    return attributes.numRegs;
  (void)cudaGetLastError();
  return 0;
}

// How many blocks of this shape the device holds at once; 0 if none fits.
template <class... P>
int64_t resident_blocks(void (*kernel)(P...), const LaunchShape& shape) {
  int per_multiprocessor = 0;
  if (allow_shared_memory(kernel, shape.shared_bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, shape.threads, shape.shared_bytes) !=
          cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return static_cast<int64_t>(per_multiprocessor) * limits().multiprocessors;
}

}  // namespace otface::simt

#endif  // __CUDACC__
#endif  // OTFACE_SIMT_HOST
