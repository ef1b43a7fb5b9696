// The entry points of the CPU kernels. Each picks the instruction set that cpu_isa() chose.
#pragma once

#include "common/executor.h"
#include "pairs/near.h"
#include "pairs/params.h"

namespace otface::pairs {

void pack_cpu(const PackParams& params, const Executor& executor);
void cost_cpu(const CostParams& params, const Executor& executor);
void gradient_cpu(const GradientParams& params, const Executor& executor);
void unpack_cpu(const UnpackParams& params, const Executor& executor);

void near_costs_cpu(const NearCostsParams& params, const Executor& executor);
void far_weights_cpu(const FarWeightsParams& params, const Executor& executor);
void near_gradient_cpu(const NearGradientParams& params, const Executor& executor);

// One row of this table per instruction set; defined in cpu_baseline.cpp, cpu_avx2.cpp and cpu_avx512.cpp.
struct CpuKernels {
  void (*pack)(const PackParams&, const Executor&);
  void (*cost)(const CostParams&, const Executor&);
  void (*gradient)(const GradientParams&, const Executor&);
  void (*unpack)(const UnpackParams&, const Executor&);
  void (*near_costs)(const NearCostsParams&, const Executor&);
  void (*far_weights)(const FarWeightsParams&, const Executor&);
  void (*near_gradient)(const NearGradientParams&, const Executor&);
};
extern const CpuKernels cpu_kernels_baseline;
#if defined(__x86_64__)
extern const CpuKernels cpu_kernels_avx2, cpu_kernels_avx512;
#endif

}  // namespace otface::pairs
