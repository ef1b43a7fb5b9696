#include "pairs/cuda_kernels.h"
#include "pairs/launch_cuda.h"

namespace otface::pairs {

const char* near_costs_cuda(const NearCostsParams& params, simt::Stream stream) {
  return params.shape.is_double ? launch_near_costs<double>(params, stream) : launch_near_costs<float>(params, stream);
}

const char* far_weights_cuda(const FarWeightsParams& params, simt::Stream stream) {
  return params.shape.is_double ? launch_far_weights<double>(params, stream)
                                : launch_far_weights<float>(params, stream);
}

const char* near_gradient_cuda(const NearGradientParams& params, simt::Stream stream) {
  return params.shape.is_double ? launch_near_gradient<double>(params, stream)
                                : launch_near_gradient<float>(params, stream);
}

}  // namespace otface::pairs
