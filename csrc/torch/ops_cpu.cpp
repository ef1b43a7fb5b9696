// The operators on the CPU: tensors in, the CPU kernels on torch's own threads, tensors out.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "sinkhorn/launch.h"
#include "torch/sinkhorn_args.h"

namespace otface::binding {
namespace {

// torch.set_num_threads is obeyed, because the tasks run on torch's own pool.
Executor torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t tasks, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t task = begin; task < end; ++task) body(context, task);
            });
          }};
}

using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using ForwardTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

ForwardTensors sinkhorn_forward(Tensor cost, Tensor eps, OptionalTensor a, OptionalTensor b, Tensor tol,
                                OptionalTensor row_lengths, OptionalTensor col_lengths, OptionalTensor init_g,
                                int64_t max_iter, int64_t check_every, bool want_plan, bool want_history) {
  const sinkhorn::Problems problems = problems_of(cost, eps, a, b, row_lengths, col_lengths);
  const ForwardOutputs out(cost, max_iter, want_plan, want_history);
  sinkhorn::forward_cpu(
      forward_params(problems, cost, tol, init_g, max_iter, check_every, want_plan, want_history, out),
      torch_threads());
  return {out.value,  out.transport_cost, out.f,          out.g,       out.plan,   out.error,
          out.n_iter, out.converged,      out.potentials, out.history, out.rebuilt};
}

ThreeTensors sinkhorn_envelope_backward(Tensor cost, Tensor eps, OptionalTensor a, OptionalTensor b,
                                        OptionalTensor row_lengths, OptionalTensor col_lengths, Tensor potentials,
                                        Tensor grad_value, bool want_cost, bool want_a, bool want_b) {
  const sinkhorn::Problems problems = problems_of(cost, eps, a, b, row_lengths, col_lengths);
  const Gradients out(cost, want_cost, want_a, want_b);
  const IncomingGradients in{grad_value, {}, {}, {}, {}};
  sinkhorn::envelope_backward_cpu(backward_params(problems, cost, potentials, in, want_cost, want_a, want_b, out),
                                  torch_threads());
  return {out.cost, out.a, out.b};
}

ThreeTensors sinkhorn_unrolled_backward(Tensor cost, Tensor eps, OptionalTensor a, OptionalTensor b,
                                        OptionalTensor row_lengths, OptionalTensor col_lengths, Tensor potentials,
                                        Tensor n_iter, Tensor history, Tensor rebuilt, OptionalTensor grad_value,
                                        OptionalTensor grad_transport_cost, OptionalTensor grad_f,
                                        OptionalTensor grad_g, OptionalTensor grad_plan, bool want_cost, bool want_a,
                                        bool want_b) {
  const sinkhorn::Problems problems = problems_of(cost, eps, a, b, row_lengths, col_lengths);
  const Gradients out(cost, want_cost, want_a, want_b);
  const IncomingGradients in{grad_value, grad_transport_cost, grad_f, grad_g, grad_plan};
  sinkhorn::BackwardParams params = backward_params(problems, cost, potentials, in, want_cost, want_a, want_b, out);
  add_history(params, cost, n_iter, history, rebuilt);
  sinkhorn::unrolled_backward_cpu(params, torch_threads());
  return {out.cost, out.a, out.b};
}

FourTensors sinkhorn_implicit_backward(Tensor cost, Tensor eps, OptionalTensor a, OptionalTensor b,
                                       OptionalTensor row_lengths, OptionalTensor col_lengths, Tensor potentials,
                                       OptionalTensor grad_value, OptionalTensor grad_transport_cost,
                                       OptionalTensor grad_f, OptionalTensor grad_g, OptionalTensor grad_plan,
                                       double tol, bool want_cost, bool want_a, bool want_b) {
  const sinkhorn::Problems problems = problems_of(cost, eps, a, b, row_lengths, col_lengths);
  const Gradients out(cost, want_cost, want_a, want_b);
  const IncomingGradients in{grad_value, grad_transport_cost, grad_f, grad_g, grad_plan};
  const Tensor converged = make(cost, true, ScalarType::Bool, {problems.batch});
  sinkhorn::BackwardParams params = backward_params(problems, cost, potentials, in, want_cost, want_a, want_b, out);
  params.tol = tol;
  params.max_iter = 100 + 10 * (problems.n < problems.m ? problems.n : problems.m);
  params.converged = static_cast<bool*>(data(converged));
  sinkhorn::implicit_backward_cpu(params, torch_threads());
  return {out.cost, out.a, out.b, converged};
}

}  // namespace
}  // namespace otface::binding

STABLE_TORCH_LIBRARY_IMPL(otface, CPU, m) {
  m.impl("sinkhorn_forward", TORCH_BOX(&otface::binding::sinkhorn_forward));
  m.impl("sinkhorn_envelope_backward", TORCH_BOX(&otface::binding::sinkhorn_envelope_backward));
  m.impl("sinkhorn_unrolled_backward", TORCH_BOX(&otface::binding::sinkhorn_unrolled_backward));
  m.impl("sinkhorn_implicit_backward", TORCH_BOX(&otface::binding::sinkhorn_implicit_backward));
}
