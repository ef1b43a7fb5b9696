#include "margin/rare.cuh"

namespace otface::margin {

template const char* launch_rescaled_products<float>(const RescaledProductsParams&, simt::Stream);
template const char* launch_rescaled_gradients<float>(const RescaledGradientsParams&, simt::Stream);
template const char* launch_own_gradients_of_x<float>(const OwnGradientsParams&, simt::Stream);
template const char* launch_own_gradients_of_weight<float>(const OwnGradientsParams&, simt::Stream);

}  // namespace otface::margin
