// Picks the CPU kernels of the instruction set in use.
#include "common/cpu_isa.h"
#include "sinkhorn/launch.h"

namespace otface::sinkhorn {
namespace {

const CpuKernels& kernels() {
#if defined(__x86_64__)
  return for_this_cpu(cpu_kernels_baseline, cpu_kernels_avx2, cpu_kernels_avx512);
#else
  return cpu_kernels_baseline;
#endif
}

}  // namespace

void forward_cpu(const ForwardParams& params, const Executor& executor) { kernels().forward(params, executor); }
void envelope_backward_cpu(const BackwardParams& params, const Executor& executor) {
  kernels().envelope_backward(params, executor);
}
void unrolled_backward_cpu(const BackwardParams& params, const Executor& executor) {
  kernels().unrolled_backward(params, executor);
}
void implicit_backward_cpu(const BackwardParams& params, const Executor& executor) {
  kernels().implicit_backward(params, executor);
}

}  // namespace otface::sinkhorn
