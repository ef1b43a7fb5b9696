// The entry points of the CPU kernels. Each picks the instruction set that cpu_isa() chose.
#pragma once

#include "common/executor.h"
#include "sinkhorn/params.h"

namespace otface::sinkhorn {

void forward_cpu(const ForwardParams& params, const Executor& executor);
void envelope_backward_cpu(const BackwardParams& params, const Executor& executor);
void unrolled_backward_cpu(const BackwardParams& params, const Executor& executor);
void implicit_backward_cpu(const BackwardParams& params, const Executor& executor);

// One row of this table per instruction set; defined in cpu_baseline.cpp, cpu_avx2.cpp and cpu_avx512.cpp.
struct CpuKernels {
  void (*forward)(const ForwardParams&, const Executor&);
  void (*envelope_backward)(const BackwardParams&, const Executor&);
  void (*unrolled_backward)(const BackwardParams&, const Executor&);
  void (*implicit_backward)(const BackwardParams&, const Executor&);
};
extern const CpuKernels cpu_kernels_baseline;
#if defined(__x86_64__)
extern const CpuKernels cpu_kernels_avx2, cpu_kernels_avx512;
#endif

}  // namespace otface::sinkhorn
