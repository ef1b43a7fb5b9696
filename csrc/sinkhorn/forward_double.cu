#include "sinkhorn/forward_kernels.cuh"

namespace otface::sinkhorn {

template KernelChoice choose_forward<double>(const ForwardParams&, Tier);
template const char* launch_forward<double>(const ForwardParams&, void*, simt::Stream, Tier);

}  // namespace otface::sinkhorn
