#include "margin/softmax.cuh"

namespace otface::margin {

template size_t workspace_of_forward_chunk<float>(const ForwardChunkParams&);
template const char* launch_forward_chunk<float>(const ForwardChunkParams&, void*, simt::Stream);
template const char* launch_loss<float>(const LossParams&, simt::Stream);
template const char* launch_backward_chunk<float>(const BackwardChunkParams&, simt::Stream);

}  // namespace otface::margin
