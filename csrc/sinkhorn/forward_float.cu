#include "sinkhorn/forward_kernels.cuh"

namespace otface::sinkhorn {

template KernelChoice choose_forward<float>(const ForwardParams&, Tier);
template const char* launch_forward<float>(const ForwardParams&, void*, simt::Stream, Tier);

}  // namespace otface::sinkhorn
