// Instantiated in forward_float.cu and forward_double.cu.
#pragma once

#include "sinkhorn/cuda_kernels.h"
#include "sinkhorn/forward.cuh"
#include "sinkhorn/tiers.cuh"

namespace otface::sinkhorn {

template <class T>
using ForwardLauncher = Launcher<Forward, T, typename ForwardTiles<T>::List>;

template <class T>
KernelChoice choose_forward(const ForwardParams& params, Tier tier) {
  return ForwardLauncher<T>::choice(params, tier);
}
template <class T>
const char* launch_forward(const ForwardParams& params, void* workspace, simt::Stream stream, Tier tier) {
  return ForwardLauncher<T>::launch(params, workspace, stream, tier);
}

}  // namespace otface::sinkhorn
