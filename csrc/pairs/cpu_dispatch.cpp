// Picks the CPU kernels of the instruction set in use.
#include "common/cpu_isa.h"
#include "pairs/launch.h"

namespace otface::pairs {
namespace {

const CpuKernels& kernels() {
#if defined(__x86_64__)
  return for_this_cpu(cpu_kernels_baseline, cpu_kernels_avx2, cpu_kernels_avx512);
#else
  return cpu_kernels_baseline;
#endif
}

}  // namespace

void pack_cpu(const PackParams& p, const Executor& e) { kernels().pack(p, e); }
void cost_cpu(const CostParams& p, const Executor& e) { kernels().cost(p, e); }
void gradient_cpu(const GradientParams& p, const Executor& e) { kernels().gradient(p, e); }
void unpack_cpu(const UnpackParams& p, const Executor& e) { kernels().unpack(p, e); }

void near_costs_cpu(const NearCostsParams& p, const Executor& e) { kernels().near_costs(p, e); }
void far_weights_cpu(const FarWeightsParams& p, const Executor& e) { kernels().far_weights(p, e); }
void near_gradient_cpu(const NearGradientParams& p, const Executor& e) { kernels().near_gradient(p, e); }

}  // namespace otface::pairs
