#include "sinkhorn/cuda_kernels.h"
#include "sinkhorn/launch_cuda.h"
#include "sinkhorn/plan.cuh"

namespace otface::sinkhorn {

KernelChoice forward_choice(const ForwardParams& params, Tier tier) {
  return params.problems.is_double ? choose_forward<double>(params, tier) : choose_forward<float>(params, tier);
}

const char* forward_cuda(const ForwardParams& params, void* workspace, simt::Stream stream, Tier tier) {
  const bool is_double = params.problems.is_double;
  const char* error = is_double ? launch_forward<double>(params, workspace, stream, tier)
                                : launch_forward<float>(params, workspace, stream, tier);
  if (*error != 0 || params.plan == nullptr) return error;
  return is_double ? launch_plan<double>(params.problems, params.potentials, nullptr, params.plan, stream)
                   : launch_plan<float>(params.problems, params.potentials, nullptr, params.plan, stream);
}

KernelChoice unrolled_backward_choice(const BackwardParams& params, Tier tier) {
  return params.problems.is_double ? choose_unrolled<double>(params, tier) : choose_unrolled<float>(params, tier);
}

const char* unrolled_backward_cuda(const BackwardParams& params, void* workspace, simt::Stream stream, Tier tier) {
  return params.problems.is_double ? launch_unrolled<double>(params, workspace, stream, tier)
                                   : launch_unrolled<float>(params, workspace, stream, tier);
}

KernelChoice implicit_backward_choice(const BackwardParams& params, Tier tier) {
  return params.problems.is_double ? choose_implicit<double>(params, tier) : choose_implicit<float>(params, tier);
}

const char* implicit_backward_cuda(const BackwardParams& params, void* workspace, simt::Stream stream, Tier tier) {
  return params.problems.is_double ? launch_implicit<double>(params, workspace, stream, tier)
                                   : launch_implicit<float>(params, workspace, stream, tier);
}

const char* envelope_backward_cuda(const BackwardParams& params, simt::Stream stream) {
  return params.problems.is_double ? launch_envelope<double>(params, stream) : launch_envelope<float>(params, stream);
}

}  // namespace otface::sinkhorn
