#include "pairs/near.cuh"

namespace otface::pairs {

template const char* launch_near_costs<double>(const NearCostsParams&, simt::Stream);
template const char* launch_far_weights<double>(const FarWeightsParams&, simt::Stream);
template const char* launch_near_gradient<double>(const NearGradientParams&, simt::Stream);

}  // namespace otface::pairs
