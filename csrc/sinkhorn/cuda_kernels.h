// What lies behind launch_cuda.h: each template is instantiated for float and double in a file of its own, so that they
// compile side by side. T is Real.
#pragma once

#include "sinkhorn/launch_cuda.h"

namespace otface::sinkhorn {

template <class T>
KernelChoice choose_forward(const ForwardParams& params, Tier tier);
template <class T>
const char* launch_forward(const ForwardParams& params, void* workspace, simt::Stream stream, Tier tier);

template <class T>
KernelChoice choose_unrolled(const BackwardParams& params, Tier tier);
template <class T>
const char* launch_unrolled(const BackwardParams& params, void* workspace, simt::Stream stream, Tier tier);

template <class T>
KernelChoice choose_implicit(const BackwardParams& params, Tier tier);
template <class T>
const char* launch_implicit(const BackwardParams& params, void* workspace, simt::Stream stream, Tier tier);

}  // namespace otface::sinkhorn
