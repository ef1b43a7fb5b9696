#include "margin/softmax.cuh"

namespace otface::margin {

template size_t workspace_of_forward_chunk<double>(const ForwardChunkParams&);
template const char* launch_forward_chunk<double>(const ForwardChunkParams&, void*, simt::Stream);
template const char* launch_loss<double>(const LossParams&, simt::Stream);
template const char* launch_backward_chunk<double>(const BackwardChunkParams&, simt::Stream);

}  // namespace otface::margin
