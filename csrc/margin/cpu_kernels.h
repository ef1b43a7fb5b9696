// Everything that is compiled once per instruction set. The including file defines OTFACE_VEC_BYTES and OTFACE_CPU_TABLE,
// and sets the target, after it has included the standard headers that these files need.
#pragma once

#include "margin/cpu_logits.h"
#include "margin/cpu_project.h"
#include "margin/cpu_rare.h"
#include "margin/cpu_softmax.h"
#include "margin/cpu_start.h"
#include "margin/launch.h"

namespace otface::margin {

#define OTFACE_FOR_REAL(kernel, is_double) (is_double) ? kernel<double>(p, e) : kernel<float>(p, e)
const CpuKernels OTFACE_CPU_TABLE = {
    [](const StartParams& p, const Executor& e) { OTFACE_FOR_REAL(start, p.is_double); },
    [](const NormsParams& p, const Executor& e) { OTFACE_FOR_REAL(inverse_norms, p.is_double); },
    [](const RescaledProductsParams& p, const Executor& e) { OTFACE_FOR_REAL(rescaled_products, p.is_double); },
    [](const ForwardChunkParams& p, const Executor& e) { OTFACE_FOR_REAL(forward_chunk, p.chunk.is_double); },
    [](const LossParams& p, const Executor& e) { OTFACE_FOR_REAL(loss, p.is_double); },
    [](const BackwardChunkParams& p, const Executor& e) { OTFACE_FOR_REAL(backward_chunk, p.chunk.is_double); },
    [](const LogitsParams& p, const Executor& e) { OTFACE_FOR_REAL(logits, p.chunk.is_double); },
    [](const LogitsBackwardParams& p, const Executor& e) { OTFACE_FOR_REAL(logits_backward, p.chunk.is_double); },
    [](const RescaledGradientsParams& p, const Executor& e) {
      return OTFACE_FOR_REAL(rescaled_gradients, p.is_double);
    },
    [](const ProjectParams& p, const Executor& e) { OTFACE_FOR_REAL(project, p.is_double); },
    [](const OwnGradientsParams& p, const Executor& e) { OTFACE_FOR_REAL(own_gradients_of_x, p.is_double); },
    [](const OwnGradientsParams& p, const Executor& e) { OTFACE_FOR_REAL(own_gradients_of_weight, p.is_double); },
};
#undef OTFACE_FOR_REAL

}  // namespace otface::margin
