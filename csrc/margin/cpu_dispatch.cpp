// Picks the CPU kernels of the instruction set in use.
#include "common/cpu_isa.h"
#include "margin/launch.h"

namespace otface::margin {
namespace {

const CpuKernels& kernels() {
#if defined(__x86_64__)
  return for_this_cpu(cpu_kernels_baseline, cpu_kernels_avx2, cpu_kernels_avx512);
#else
  return cpu_kernels_baseline;
#endif
}

}  // namespace

void start_cpu(const StartParams& p, const Executor& e) { kernels().start(p, e); }
void inverse_norms_cpu(const NormsParams& p, const Executor& e) { kernels().inverse_norms(p, e); }
void rescaled_products_cpu(const RescaledProductsParams& p, const Executor& e) { kernels().rescaled_products(p, e); }
void forward_chunk_cpu(const ForwardChunkParams& p, const Executor& e) { kernels().forward_chunk(p, e); }
void loss_cpu(const LossParams& p, const Executor& e) { kernels().loss(p, e); }
void backward_chunk_cpu(const BackwardChunkParams& p, const Executor& e) { kernels().backward_chunk(p, e); }
void logits_cpu(const LogitsParams& p, const Executor& e) { kernels().logits(p, e); }
void logits_backward_cpu(const LogitsBackwardParams& p, const Executor& e) { kernels().logits_backward(p, e); }
bool rescaled_gradients_cpu(const RescaledGradientsParams& p, const Executor& e) {
  return kernels().rescaled_gradients(p, e);
}
void project_cpu(const ProjectParams& p, const Executor& e) { kernels().project(p, e); }
void own_gradients_of_x_cpu(const OwnGradientsParams& p, const Executor& e) { kernels().own_gradients_of_x(p, e); }
void own_gradients_of_weight_cpu(const OwnGradientsParams& p, const Executor& e) {
  kernels().own_gradients_of_weight(p, e);
}

}  // namespace otface::margin
