// From tensors to the plain structs of the Sinkhorn kernels, the same for every device.
#pragma once

#include "sinkhorn/params.h"
#include "torch/tensors.h"

namespace otface::binding {

inline sinkhorn::WeightsView weights_view(const OptionalTensor& w, const char* name, const Tensor& cost,
                                          int64_t count) {
  if (!w) return {nullptr, 0, 0};
  check_tensor(*w, name, cost, real_of(cost), {cost.size(0), count});
  return {w->const_data_ptr(), w->stride(0), w->stride(1)};
}

inline const int64_t* lengths_of(const OptionalTensor& lengths, const char* name, const Tensor& cost) {
  if (!lengths) return nullptr;
  check_contiguous(*lengths, name, cost, ScalarType::Long, {cost.size(0)});
  return lengths->const_data_ptr<int64_t>();
}

inline sinkhorn::Problems problems_of(const Tensor& cost, const Tensor& eps, const OptionalTensor& a,
                                      const OptionalTensor& b, const OptionalTensor& row_lengths,
                                      const OptionalTensor& col_lengths) {
  STD_TORCH_CHECK(cost.dim() == 3 && cost.size(1) > 0 && cost.size(2) > 0, "cost must be (B, n, m) with n, m >= 1");
  sinkhorn::Problems p{};
  p.is_double = cost.scalar_type() == ScalarType::Double;
  p.batch = cost.size(0);
  p.n = cost.size(1);
  p.m = cost.size(2);
  p.cost = {cost.const_data_ptr(), dtype_of(cost, "cost"), cost.stride(0), cost.stride(1), cost.stride(2)};
  p.a = weights_view(a, "a", cost, p.n);
  p.b = weights_view(b, "b", cost, p.m);
  check_tensor(eps, "eps", cost, ScalarType::Double, {p.batch});
  p.eps = eps.const_data_ptr<double>();
  p.eps_stride = eps.stride(0);
  p.row_lengths = lengths_of(row_lengths, "row_lengths", cost);
  p.col_lengths = lengths_of(col_lengths, "col_lengths", cost);
  return p;
}

struct ForwardOutputs {
  Tensor value, transport_cost, f, g, plan, error, n_iter, converged, potentials, history, rebuilt;

  ForwardOutputs(const Tensor& cost, int64_t max_iter, bool want_plan, bool want_history) {
    const int64_t B = cost.size(0), n = cost.size(1), m = cost.size(2);
    const ScalarType real = real_of(cost);
    value = make(cost, true, real, {B});
    transport_cost = make(cost, true, real, {B});
    f = make(cost, true, real, {B, n});
    g = make(cost, true, real, {B, m});
    plan = make(cost, want_plan, real, {B, n, m});
    error = make(cost, true, real, {B});
    n_iter = make(cost, true, ScalarType::Long, {B});
    converged = make(cost, true, ScalarType::Bool, {B});
    potentials = make(cost, true, ScalarType::Double, {B, n + m});
    history = make(cost, want_history, real, {B, max_iter, m + (n > m ? n : m)});
    rebuilt = make(cost, want_history, ScalarType::Byte, {B, max_iter});
  }
};

inline sinkhorn::ForwardParams forward_params(const sinkhorn::Problems& problems, const Tensor& cost, const Tensor& tol,
                                              const OptionalTensor& init_g, int64_t max_iter, int64_t check_every,
                                              bool want_plan, bool want_history, const ForwardOutputs& out) {
  STD_TORCH_CHECK(max_iter >= 1, "max_iter must be at least 1");
  STD_TORCH_CHECK(check_every >= 1, "check_every must be at least 1");
  check_tensor(tol, "tol", cost, ScalarType::Double, {problems.batch});
  if (init_g) check_contiguous(*init_g, "init_g", cost, real_of(cost), {problems.batch, problems.m});
  sinkhorn::ForwardParams p{};
  p.problems = problems;
  p.init_g = init_g ? init_g->const_data_ptr() : nullptr;
  p.tol = tol.const_data_ptr<double>();
  p.tol_stride = tol.stride(0);
  p.max_iter = max_iter;
  p.check_every = check_every;
  p.value = data(out.value);
  p.transport_cost = data(out.transport_cost);
  p.f = data(out.f);
  p.g = data(out.g);
  p.plan = data(out.plan, want_plan);
  p.error = data(out.error);
  p.n_iter = static_cast<int64_t*>(data(out.n_iter));
  p.converged = static_cast<bool*>(data(out.converged));
  p.potentials = static_cast<double*>(data(out.potentials));
  if (want_history)
    p.history = {data(out.history), static_cast<uint8_t*>(data(out.rebuilt)), max_iter, out.history.size(2)};
  return p;
}

struct IncomingGradients {
  OptionalTensor value, transport_cost, f, g, plan;
};

struct Gradients {
  Tensor cost, a, b;

  Gradients(const Tensor& like, bool want_cost, bool want_a, bool want_b)
      : cost(make(like, want_cost, real_of(like), {like.size(0), like.size(1), like.size(2)})),
        a(make(like, want_a, real_of(like), {like.size(0), like.size(1)})),
        b(make(like, want_b, real_of(like), {like.size(0), like.size(2)})) {}
};

inline const void* incoming(const OptionalTensor& t, const char* name, const Tensor& cost,
                            std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check_contiguous(*t, name, cost, real_of(cost), shape);
  return t->const_data_ptr();
}

inline sinkhorn::BackwardParams backward_params(const sinkhorn::Problems& problems, const Tensor& cost,
                                                const Tensor& potentials, const IncomingGradients& in, bool want_cost,
                                                bool want_a, bool want_b, const Gradients& out) {
  const int64_t B = problems.batch, n = problems.n, m = problems.m;
  check_contiguous(potentials, "potentials", cost, ScalarType::Double, {B, n + m});
  sinkhorn::BackwardParams p{};
  p.problems = problems;
  p.potentials = potentials.const_data_ptr<double>();
  p.grad_value = incoming(in.value, "grad_value", cost, {B});
  p.grad_transport_cost = incoming(in.transport_cost, "grad_transport_cost", cost, {B});
  p.grad_f = incoming(in.f, "grad_f", cost, {B, n});
  p.grad_g = incoming(in.g, "grad_g", cost, {B, m});
  p.grad_plan = incoming(in.plan, "grad_plan", cost, {B, n, m});
  p.grad_cost = data(out.cost, want_cost);
  p.grad_a = data(out.a, want_a);
  p.grad_b = data(out.b, want_b);
  return p;
}

inline void add_history(sinkhorn::BackwardParams& p, const Tensor& cost, const Tensor& n_iter, const Tensor& history,
                        const Tensor& rebuilt) {
  const int64_t B = p.problems.batch, n = p.problems.n, m = p.problems.m;
  STD_TORCH_CHECK(history.dim() == 3, "history must have three dimensions");
  const int64_t max_iter = history.size(1);
  check_contiguous(history, "history", cost, real_of(cost), {B, max_iter, m + (n > m ? n : m)});
  check_contiguous(rebuilt, "rebuilt", cost, ScalarType::Byte, {B, max_iter});
  check_contiguous(n_iter, "n_iter", cost, ScalarType::Long, {B});
  p.n_iter = n_iter.const_data_ptr<int64_t>();
  p.history = {const_cast<void*>(history.const_data_ptr()), const_cast<uint8_t*>(rebuilt.const_data_ptr<uint8_t>()),
               max_iter, history.size(2)};
}

}  // namespace otface::binding
