#include "pairs/near.cuh"

namespace otface::pairs {

template const char* launch_near_costs<float>(const NearCostsParams&, simt::Stream);
template const char* launch_far_weights<float>(const FarWeightsParams&, simt::Stream);
template const char* launch_near_gradient<float>(const NearGradientParams&, simt::Stream);

}  // namespace otface::pairs
