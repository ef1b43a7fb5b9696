#include "margin/rare.cuh"

namespace otface::margin {

template const char* launch_rescaled_products<double>(const RescaledProductsParams&, simt::Stream);
template const char* launch_rescaled_gradients<double>(const RescaledGradientsParams&, simt::Stream);
template const char* launch_own_gradients_of_x<double>(const OwnGradientsParams&, simt::Stream);
template const char* launch_own_gradients_of_weight<double>(const OwnGradientsParams&, simt::Stream);

}  // namespace otface::margin
