// What lies behind launch_cuda.h: each template is instantiated for float and double in a file of its own, so that they
// compile side by side. T is Real.
#pragma once

#include "margin/launch_cuda.h"

namespace otface::margin {

// rows_float.cu, rows_double.cu
template <class T>
const char* launch_start(const StartParams& params, simt::Stream stream);
template <class T>
const char* launch_inverse_norms(const NormsParams& params, simt::Stream stream);
template <class T>
const char* launch_project(const ProjectParams& params, simt::Stream stream);

// rare_float.cu, rare_double.cu
template <class T>
const char* launch_rescaled_products(const RescaledProductsParams& params, simt::Stream stream);
template <class T>
const char* launch_rescaled_gradients(const RescaledGradientsParams& params, simt::Stream stream);
template <class T>
const char* launch_own_gradients_of_x(const OwnGradientsParams& params, simt::Stream stream);
template <class T>
const char* launch_own_gradients_of_weight(const OwnGradientsParams& params, simt::Stream stream);

// softmax_float.cu, softmax_double.cu
template <class T>
size_t workspace_of_forward_chunk(const ForwardChunkParams& params);
template <class T>
const char* launch_forward_chunk(const ForwardChunkParams& params, void* workspace, simt::Stream stream);
template <class T>
const char* launch_loss(const LossParams& params, simt::Stream stream);
template <class T>
const char* launch_backward_chunk(const BackwardChunkParams& params, simt::Stream stream);

// logits_float.cu, logits_double.cu
template <class T>
const char* launch_logits(const LogitsParams& params, simt::Stream stream);
template <class T>
const char* launch_logits_backward(const LogitsBackwardParams& params, simt::Stream stream);

}  // namespace otface::margin
