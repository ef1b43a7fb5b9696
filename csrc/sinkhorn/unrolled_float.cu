#include "sinkhorn/unrolled_kernels.cuh"

namespace otface::sinkhorn {

template KernelChoice choose_unrolled<float>(const BackwardParams&, Tier);
template const char* launch_unrolled<float>(const BackwardParams&, void*, simt::Stream, Tier);

}  // namespace otface::sinkhorn
