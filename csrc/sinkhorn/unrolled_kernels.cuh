// Instantiated in unrolled_float.cu and unrolled_double.cu.
#pragma once

#include "sinkhorn/cuda_kernels.h"
#include "sinkhorn/tiers.cuh"
#include "sinkhorn/unrolled.cuh"

namespace otface::sinkhorn {

template <class T>
using UnrolledLauncher = Launcher<Unrolled, T, typename UnrolledTiles<T>::List>;

template <class T>
KernelChoice choose_unrolled(const BackwardParams& params, Tier tier) {
  return UnrolledLauncher<T>::choice(params, tier);
}
template <class T>
const char* launch_unrolled(const BackwardParams& params, void* workspace, simt::Stream stream, Tier tier) {
  return UnrolledLauncher<T>::launch(params, workspace, stream, tier);
}

}  // namespace otface::sinkhorn
