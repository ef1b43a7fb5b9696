#include "sinkhorn/implicit_kernels.cuh"

namespace otface::sinkhorn {

template KernelChoice choose_implicit<float>(const BackwardParams&, Tier);
template const char* launch_implicit<float>(const BackwardParams&, void*, simt::Stream, Tier);

}  // namespace otface::sinkhorn
