// The entry points of the CPU kernels. Each picks the instruction set that cpu_isa() chose. On the CPU the products are
// Real: half types are converted before them.
#pragma once

#include "common/executor.h"
#include "margin/params.h"

namespace otface::margin {

void start_cpu(const StartParams& params, const Executor& executor);
void inverse_norms_cpu(const NormsParams& params, const Executor& executor);
void rescaled_products_cpu(const RescaledProductsParams& params, const Executor& executor);
void forward_chunk_cpu(const ForwardChunkParams& params, const Executor& executor);
void loss_cpu(const LossParams& params, const Executor& executor);
void backward_chunk_cpu(const BackwardChunkParams& params, const Executor& executor);
void logits_cpu(const LogitsParams& params, const Executor& executor);
void logits_backward_cpu(const LogitsBackwardParams& params, const Executor& executor);
// Returns whether there is something in grad_x now: nothing is written where no class is rescaled.
bool rescaled_gradients_cpu(const RescaledGradientsParams& params, const Executor& executor);
void project_cpu(const ProjectParams& params, const Executor& executor);
void own_gradients_of_x_cpu(const OwnGradientsParams& params, const Executor& executor);
void own_gradients_of_weight_cpu(const OwnGradientsParams& params, const Executor& executor);

// One row of this table per instruction set; defined in cpu_baseline.cpp, cpu_avx2.cpp and cpu_avx512.cpp.
struct CpuKernels {
  void (*start)(const StartParams&, const Executor&);
  void (*inverse_norms)(const NormsParams&, const Executor&);
  void (*rescaled_products)(const RescaledProductsParams&, const Executor&);
  void (*forward_chunk)(const ForwardChunkParams&, const Executor&);
  void (*loss)(const LossParams&, const Executor&);
  void (*backward_chunk)(const BackwardChunkParams&, const Executor&);
  void (*logits)(const LogitsParams&, const Executor&);
  void (*logits_backward)(const LogitsBackwardParams&, const Executor&);
  bool (*rescaled_gradients)(const RescaledGradientsParams&, const Executor&);
  void (*project)(const ProjectParams&, const Executor&);
  void (*own_gradients_of_x)(const OwnGradientsParams&, const Executor&);
  void (*own_gradients_of_weight)(const OwnGradientsParams&, const Executor&);
};
extern const CpuKernels cpu_kernels_baseline;
#if defined(__x86_64__)
extern const CpuKernels cpu_kernels_avx2, cpu_kernels_avx512;
#endif

}  // namespace otface::margin
