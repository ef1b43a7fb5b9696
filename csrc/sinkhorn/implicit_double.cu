#include "sinkhorn/implicit_kernels.cuh"

namespace otface::sinkhorn {

template KernelChoice choose_implicit<double>(const BackwardParams&, Tier);
template const char* launch_implicit<double>(const BackwardParams&, void*, simt::Stream, Tier);

}  // namespace otface::sinkhorn
