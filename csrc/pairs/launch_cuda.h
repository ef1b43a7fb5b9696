// The entry points of the CUDA kernels on costs. Plain C++: the binding and the host executor include this, nvcc compiles
// what is behind it. Each function returns "" or what went wrong, in words.
#pragma once

#include "common/simt.h"
#include "pairs/near.h"

namespace otface::pairs {

const char* near_costs_cuda(const NearCostsParams& params, simt::Stream stream);
const char* far_weights_cuda(const FarWeightsParams& params, simt::Stream stream);
const char* near_gradient_cuda(const NearGradientParams& params, simt::Stream stream);

}  // namespace otface::pairs
