// Instantiated in implicit_float.cu and implicit_double.cu.
#pragma once

#include "sinkhorn/cuda_kernels.h"
#include "sinkhorn/implicit.cuh"
#include "sinkhorn/tiers.cuh"

namespace otface::sinkhorn {

template <class M>
using ImplicitToFloat = Implicit<M, float>;
template <class M>
using ImplicitToDouble = Implicit<M, double>;

// Always in double, whatever the arguments are; no register tier.
template <class T>
struct ImplicitLauncher;
template <>
struct ImplicitLauncher<float> : Launcher<ImplicitToFloat, double, Tiles<>> {};
template <>
struct ImplicitLauncher<double> : Launcher<ImplicitToDouble, double, Tiles<>> {};

template <class T>
KernelChoice choose_implicit(const BackwardParams& params, Tier tier) {
  return ImplicitLauncher<T>::choice(params, tier);
}
template <class T>
const char* launch_implicit(const BackwardParams& params, void* workspace, simt::Stream stream, Tier tier) {
  return ImplicitLauncher<T>::launch(params, workspace, stream, tier);
}

}  // namespace otface::sinkhorn
