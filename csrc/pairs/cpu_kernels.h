// Everything that is compiled once per instruction set. The including file defines OTFACE_VEC_BYTES and OTFACE_CPU_TABLE,
// and sets the target, after it has included the standard headers that these files need.
#pragma once

#include "pairs/cpu_cost.h"
#include "pairs/cpu_gradient.h"
#include "pairs/cpu_near.h"
#include "pairs/cpu_pack.h"
#include "pairs/launch.h"

namespace otface::pairs {

#define OTFACE_FOR_REAL(kernel) p.shape.is_double ? kernel<double>(p, e) : kernel<float>(p, e)
const CpuKernels OTFACE_CPU_TABLE = {
    [](const PackParams& p, const Executor& e) { OTFACE_FOR_REAL(pack); },
    [](const CostParams& p, const Executor& e) { OTFACE_FOR_REAL(cost); },
    [](const GradientParams& p, const Executor& e) { OTFACE_FOR_REAL(gradient); },
    [](const UnpackParams& p, const Executor& e) { OTFACE_FOR_REAL(unpack); },
    [](const NearCostsParams& p, const Executor& e) { OTFACE_FOR_REAL(near_costs); },
    [](const FarWeightsParams& p, const Executor& e) { OTFACE_FOR_REAL(far_weights); },
    [](const NearGradientParams& p, const Executor& e) { OTFACE_FOR_REAL(near_gradient); },
};
#undef OTFACE_FOR_REAL

}  // namespace otface::pairs
