// The entry points of the CUDA kernels, and which kernel a problem takes. Plain C++: the binding and the host executor
// include this, nvcc compiles what is behind it (tiers.cuh).
#pragma once

#include <cstddef>

#include "common/simt.h"
#include "sinkhorn/params.h"

namespace otface::sinkhorn {

enum class Tier : int { any, registers, shared, stream };  // `any`: the first that fits, in this order

// How a batch is laid on the device.
struct KernelChoice {
  Tier tier = Tier::any;             // `any`: none fits
  int tile_rows = 0, tile_cols = 0;  // register tier: rows and columns of K per lane
  int threads_per_problem = 0, problems_per_block = 1;
  int blocks_per_problem = 1;  // stream tier: the gang
  int registers = 0;           // per thread; 0 where no device can be asked
  size_t shared_bytes = 0;     // per block
  size_t workspace_bytes = 0;  // global memory beside arguments and results
};

// Each operator: what it would launch; and the launch, which returns "" or what went wrong, in words. `workspace` holds
// workspace_bytes, aligned to 256. A tier other than `any` is for tests.
KernelChoice forward_choice(const ForwardParams& params, Tier tier = Tier::any);
KernelChoice unrolled_backward_choice(const BackwardParams& params, Tier tier = Tier::any);
KernelChoice implicit_backward_choice(const BackwardParams& params, Tier tier = Tier::any);

const char* forward_cuda(const ForwardParams& params, void* workspace, simt::Stream stream, Tier tier = Tier::any);
const char* envelope_backward_cuda(const BackwardParams& params, simt::Stream stream);
const char* unrolled_backward_cuda(const BackwardParams& params, void* workspace, simt::Stream stream,
                                   Tier tier = Tier::any);
const char* implicit_backward_cuda(const BackwardParams& params, void* workspace, simt::Stream stream,
                                   Tier tier = Tier::any);

}  // namespace otface::sinkhorn
