// Everything that is compiled once per instruction set. The including file defines OTFACE_VEC_BYTES and OTFACE_CPU_TABLE,
// and sets the target, after it has included the standard headers that these files need.
#pragma once

#include "sinkhorn/cpu_envelope.h"
#include "sinkhorn/cpu_forward.h"
#include "sinkhorn/cpu_implicit.h"
#include "sinkhorn/cpu_unrolled.h"
#include "sinkhorn/launch.h"

namespace otface::sinkhorn {

const CpuKernels OTFACE_CPU_TABLE = {
    [](const ForwardParams& p, const Executor& e) {
      p.problems.is_double ? forward<double>(p, e) : forward<float>(p, e);
    },
    [](const BackwardParams& p, const Executor& e) {
      p.problems.is_double ? envelope_backward<double>(p, e) : envelope_backward<float>(p, e);
    },
    [](const BackwardParams& p, const Executor& e) {
      p.problems.is_double ? unrolled_backward<double>(p, e) : unrolled_backward<float>(p, e);
    },
    [](const BackwardParams& p, const Executor& e) {
      p.problems.is_double ? implicit_backward<double>(p, e) : implicit_backward<float>(p, e);
    },
};

}  // namespace otface::sinkhorn
