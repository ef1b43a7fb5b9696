// The entry points of the CUDA kernels of the margin operators. Plain C++: the binding and the host executor include
// this, nvcc compiles what is behind it. Each function returns "" or what went wrong, in words.
//
// float64 goes with float64 alone: where `is_double`, every matrix and `product_dtype` are float64, else none is.
#pragma once

#include <cstddef>

#include "common/simt.h"
#include "margin/params.h"

namespace otface::margin {

const char* start_cuda(const StartParams& params, simt::Stream stream);
const char* inverse_norms_cuda(const NormsParams& params, simt::Stream stream);

// `workspace` holds this many bytes, aligned to 16; nothing is kept in it between launches.
size_t forward_chunk_workspace(const ForwardChunkParams& params);
const char* forward_chunk_cuda(const ForwardChunkParams& params, void* workspace, simt::Stream stream);

const char* loss_cuda(const LossParams& params, simt::Stream stream);
const char* backward_chunk_cuda(const BackwardChunkParams& params, simt::Stream stream);
const char* logits_cuda(const LogitsParams& params, simt::Stream stream);
const char* logits_backward_cuda(const LogitsBackwardParams& params, simt::Stream stream);
const char* project_cuda(const ProjectParams& params, simt::Stream stream);

const char* rescaled_products_cuda(const RescaledProductsParams& params, simt::Stream stream);
const char* rescaled_gradients_cuda(const RescaledGradientsParams& params, simt::Stream stream);
const char* own_gradients_of_x_cuda(const OwnGradientsParams& params, simt::Stream stream);
const char* own_gradients_of_weight_cuda(const OwnGradientsParams& params, simt::Stream stream);

}  // namespace otface::margin
