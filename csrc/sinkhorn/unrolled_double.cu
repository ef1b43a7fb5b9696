#include "sinkhorn/unrolled_kernels.cuh"

namespace otface::sinkhorn {

template KernelChoice choose_unrolled<double>(const BackwardParams&, Tier);
template const char* launch_unrolled<double>(const BackwardParams&, void*, simt::Stream, Tier);

}  // namespace otface::sinkhorn
