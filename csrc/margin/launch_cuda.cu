#include "margin/cuda_kernels.h"
#include "margin/launch_cuda.h"

namespace otface::margin {

const char* start_cuda(const StartParams& params, simt::Stream stream) {
  return params.is_double ? launch_start<double>(params, stream) : launch_start<float>(params, stream);
}

const char* inverse_norms_cuda(const NormsParams& params, simt::Stream stream) {
  return params.is_double ? launch_inverse_norms<double>(params, stream) : launch_inverse_norms<float>(params, stream);
}

size_t forward_chunk_workspace(const ForwardChunkParams& params) {
  return params.chunk.is_double ? workspace_of_forward_chunk<double>(params)
                                : workspace_of_forward_chunk<float>(params);
}

const char* forward_chunk_cuda(const ForwardChunkParams& params, void* workspace, simt::Stream stream) {
  return params.chunk.is_double ? launch_forward_chunk<double>(params, workspace, stream)
                                : launch_forward_chunk<float>(params, workspace, stream);
}

const char* loss_cuda(const LossParams& params, simt::Stream stream) {
  return params.is_double ? launch_loss<double>(params, stream) : launch_loss<float>(params, stream);
}

const char* backward_chunk_cuda(const BackwardChunkParams& params, simt::Stream stream) {
  return params.chunk.is_double ? launch_backward_chunk<double>(params, stream)
                                : launch_backward_chunk<float>(params, stream);
}

const char* logits_cuda(const LogitsParams& params, simt::Stream stream) {
  return params.chunk.is_double ? launch_logits<double>(params, stream) : launch_logits<float>(params, stream);
}

const char* logits_backward_cuda(const LogitsBackwardParams& params, simt::Stream stream) {
  return params.chunk.is_double ? launch_logits_backward<double>(params, stream)
                                : launch_logits_backward<float>(params, stream);
}

const char* project_cuda(const ProjectParams& params, simt::Stream stream) {
  return params.is_double ? launch_project<double>(params, stream) : launch_project<float>(params, stream);
}

const char* rescaled_products_cuda(const RescaledProductsParams& params, simt::Stream stream) {
  return params.is_double ? launch_rescaled_products<double>(params, stream)
                          : launch_rescaled_products<float>(params, stream);
}

const char* rescaled_gradients_cuda(const RescaledGradientsParams& params, simt::Stream stream) {
  return params.is_double ? launch_rescaled_gradients<double>(params, stream)
                          : launch_rescaled_gradients<float>(params, stream);
}

const char* own_gradients_of_x_cuda(const OwnGradientsParams& params, simt::Stream stream) {
  return params.is_double ? launch_own_gradients_of_x<double>(params, stream)
                          : launch_own_gradients_of_x<float>(params, stream);
}

const char* own_gradients_of_weight_cuda(const OwnGradientsParams& params, simt::Stream stream) {
  return params.is_double ? launch_own_gradients_of_weight<double>(params, stream)
                          : launch_own_gradients_of_weight<float>(params, stream);
}

}  // namespace otface::margin
