// What lies behind launch_cuda.h: each template is instantiated for float and double in a file of its own, so that they
// compile side by side. T is Real.
#pragma once

#include "pairs/launch_cuda.h"

namespace otface::pairs {

// near_float.cu, near_double.cu
template <class T>
const char* launch_near_costs(const NearCostsParams& params, simt::Stream stream);
template <class T>
const char* launch_far_weights(const FarWeightsParams& params, simt::Stream stream);
template <class T>
const char* launch_near_gradient(const NearGradientParams& params, simt::Stream stream);

}  // namespace otface::pairs
