// The bodies of the Sinkhorn operators, the same for every device: tensors in, kernels, tensors out. A Device has one
// function per kernel; its second argument is a tensor on the device at hand.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/sinkhorn_args.h"

namespace otface::binding {

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using ForwardTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
ForwardTensors sinkhorn_forward(Tensor cost, Tensor eps, OptionalTensor a, OptionalTensor b, Tensor tol,
                                OptionalTensor row_lengths, OptionalTensor col_lengths, OptionalTensor init_g,
                                int64_t max_iter, int64_t check_every, bool want_plan, bool want_history,
                                double mass_tolerance) {
  const sinkhorn::Problems problems = problems_of(cost, eps, a, b, row_lengths, col_lengths, mass_tolerance);
  const ForwardOutputs out(cost, problems.n, problems.m, max_iter, want_plan, want_history);
  Device::forward(forward_params(problems, cost, tol, init_g, max_iter, check_every, want_plan, want_history, out),
                  cost);
  return {out.value,  out.transport_cost, out.f,          out.g,       out.plan,   out.error,
          out.n_iter, out.converged,      out.potentials, out.history, out.rebuilt};
}

template <class Device>
ThreeTensors sinkhorn_envelope_backward(Tensor cost, Tensor eps, OptionalTensor a, OptionalTensor b,
                                        OptionalTensor row_lengths, OptionalTensor col_lengths, Tensor potentials,
                                        Tensor grad_value, bool want_cost, bool want_a, bool want_b) {
  const sinkhorn::Problems problems = problems_of(cost, eps, a, b, row_lengths, col_lengths);
  const Gradients out(cost, problems.n, problems.m, want_cost, want_a, want_b);
  const IncomingGradients in{grad_value, {}, {}, {}, {}};
  Device::envelope_backward(backward_params(problems, cost, potentials, in, want_cost, want_a, want_b, out), cost);
  return {out.cost, out.a, out.b};
}

template <class Device>
ThreeTensors sinkhorn_unrolled_backward(Tensor cost, Tensor eps, OptionalTensor a, OptionalTensor b,
                                        OptionalTensor row_lengths, OptionalTensor col_lengths, Tensor potentials,
                                        Tensor n_iter, Tensor history, Tensor rebuilt, OptionalTensor grad_value,
                                        OptionalTensor grad_transport_cost, OptionalTensor grad_f,
                                        OptionalTensor grad_g, OptionalTensor grad_plan, bool want_cost, bool want_a,
                                        bool want_b) {
  const sinkhorn::Problems problems = problems_of(cost, eps, a, b, row_lengths, col_lengths);
  const Gradients out(cost, problems.n, problems.m, want_cost, want_a, want_b);
  const IncomingGradients in{grad_value, grad_transport_cost, grad_f, grad_g, grad_plan};
  sinkhorn::BackwardParams params = backward_params(problems, cost, potentials, in, want_cost, want_a, want_b, out);
  add_history(params, cost, n_iter, history, rebuilt);
  Device::unrolled_backward(params, cost);
  return {out.cost, out.a, out.b};
}

template <class Device>
FourTensors sinkhorn_implicit_backward(Tensor cost, Tensor eps, OptionalTensor a, OptionalTensor b,
                                       OptionalTensor row_lengths, OptionalTensor col_lengths, Tensor potentials,
                                       OptionalTensor grad_value, OptionalTensor grad_transport_cost,
                                       OptionalTensor grad_f, OptionalTensor grad_g, OptionalTensor grad_plan,
                                       double tol, bool want_cost, bool want_a, bool want_b) {
  const sinkhorn::Problems problems = problems_of(cost, eps, a, b, row_lengths, col_lengths);
  const Gradients out(cost, problems.n, problems.m, want_cost, want_a, want_b);
  const IncomingGradients in{grad_value, grad_transport_cost, grad_f, grad_g, grad_plan};
  const Tensor converged = make(cost, true, ScalarType::Bool, of_problem(cost, {}));
  sinkhorn::BackwardParams params = backward_params(problems, cost, potentials, in, want_cost, want_a, want_b, out);
  params.tol = tol;
  params.max_iter = 100 + 10 * (problems.n < problems.m ? problems.n : problems.m);
  params.converged = static_cast<bool*>(data(converged));
  Device::implicit_backward(params, cost);
  return {out.cost, out.a, out.b, converged};
}

// Registers the operators in the library `m` (of one dispatch key).
#define OTFACE_REGISTER_SINKHORN(m, Device)                                                              \
  m.impl("sinkhorn_forward", TORCH_BOX(&otface::binding::sinkhorn_forward<Device>));                     \
  m.impl("sinkhorn_envelope_backward", TORCH_BOX(&otface::binding::sinkhorn_envelope_backward<Device>)); \
  m.impl("sinkhorn_unrolled_backward", TORCH_BOX(&otface::binding::sinkhorn_unrolled_backward<Device>)); \
  m.impl("sinkhorn_implicit_backward", TORCH_BOX(&otface::binding::sinkhorn_implicit_backward<Device>))

}  // namespace otface::binding
