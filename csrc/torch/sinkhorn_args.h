// From tensors to the plain structs of the Sinkhorn kernels, the same for every device.
#pragma once

#include <limits>

#include "sinkhorn/params.h"
#include "torch/tensors.h"

namespace otface::binding {

// The shape of what belongs to each problem: with a batch in front if the cost has one.
inline Shape of_problem(const Tensor& cost, std::initializer_list<int64_t> sizes) {
  Shape shape{};
  if (cost.dim() == 3) shape.add(cost.size(0));
  for (const int64_t size : sizes) shape.add(size);
  return shape;
}

inline sinkhorn::WeightsView weights_view(const OptionalTensor& w, const char* name, const Tensor& cost,
                                          int64_t count) {
  if (!w) return {nullptr, 0, 0};
  check_tensor(*w, name, cost, real_of(cost), of_problem(cost, {count}));
  const int64_t batched = w->dim() - 1;
  return {w->const_data_ptr(), batched != 0 ? w->stride(0) : 0, w->stride(batched)};
}

// One number for each problem, or for all of them.
struct Numbers {
  const double* data;
  int64_t stride;
};
inline Numbers numbers_of(const Tensor& numbers, const char* name, const Tensor& cost, int64_t batch) {
  const bool each = numbers.dim() > 0;
  check_tensor(numbers, name, cost, ScalarType::Double, each ? Shape{batch} : Shape{});
  return {numbers.const_data_ptr<double>(), each ? numbers.stride(0) : 0};
}

inline const int64_t* lengths_of(const OptionalTensor& lengths, const char* name, const Tensor& cost, int64_t batch) {
  if (!lengths) return nullptr;
  check_contiguous(*lengths, name, cost, ScalarType::Long, {batch});
  return lengths->const_data_ptr<int64_t>();
}

// For a backward pass the masses need not agree: where they did not, the forward left NaN for potentials.
inline sinkhorn::Problems problems_of(const Tensor& cost, const Tensor& eps, const OptionalTensor& a,
                                      const OptionalTensor& b, const OptionalTensor& row_lengths,
                                      const OptionalTensor& col_lengths,
                                      double mass_tolerance = std::numeric_limits<double>::infinity()) {
  STD_TORCH_CHECK(cost.dim() == 2 || cost.dim() == 3, "cost must be (B, n, m) or (n, m)");
  const int64_t rows = cost.dim() - 2, cols = rows + 1;
  STD_TORCH_CHECK(cost.size(rows) > 0 && cost.size(cols) > 0, "cost must have n, m >= 1");
  sinkhorn::Problems p{};
  p.is_double = cost.scalar_type() == ScalarType::Double;
  p.batch = rows > 0 ? cost.size(0) : 1;
  p.n = cost.size(rows);
  p.m = cost.size(cols);
  p.cost = {cost.const_data_ptr(), dtype_of(cost, "cost"), rows > 0 ? cost.stride(0) : 0, cost.stride(rows),
            cost.stride(cols)};
  p.a = weights_view(a, "a", cost, p.n);
  p.b = weights_view(b, "b", cost, p.m);
  const Numbers of_eps = numbers_of(eps, "eps", cost, p.batch);
  p.eps = of_eps.data;
  p.eps_stride = of_eps.stride;
  p.mass_tolerance = mass_tolerance;
  p.row_lengths = lengths_of(row_lengths, "row_lengths", cost, p.batch);
  p.col_lengths = lengths_of(col_lengths, "col_lengths", cost, p.batch);
  return p;
}

struct ForwardOutputs {
  Tensor value, transport_cost, f, g, plan, error, n_iter, converged, potentials, history, rebuilt;

  ForwardOutputs(const Tensor& cost, int64_t n, int64_t m, int64_t max_iter, bool want_plan, bool want_history)
      : value(of_each(cost, real_of(cost), {})),
        transport_cost(of_each(cost, real_of(cost), {})),
        f(of_each(cost, real_of(cost), {n})),
        g(of_each(cost, real_of(cost), {m})),
        plan(of_each(cost, real_of(cost), {n, m}, want_plan)),
        error(of_each(cost, real_of(cost), {})),
        n_iter(of_each(cost, ScalarType::Long, {})),
        converged(of_each(cost, ScalarType::Bool, {})),
        potentials(of_each(cost, ScalarType::Double, {n + m})),
        history(of_each(cost, real_of(cost), {max_iter, m + (n > m ? n : m)}, want_history)),
        rebuilt(of_each(cost, ScalarType::Byte, {max_iter}, want_history)) {}

 private:
  static Tensor of_each(const Tensor& cost, ScalarType dtype, std::initializer_list<int64_t> sizes,
                        bool wanted = true) {
    return make(cost, wanted, dtype, of_problem(cost, sizes));
  }
};

inline sinkhorn::ForwardParams forward_params(const sinkhorn::Problems& problems, const Tensor& cost, const Tensor& tol,
                                              const OptionalTensor& init_g, int64_t max_iter, int64_t check_every,
                                              bool want_plan, bool want_history, const ForwardOutputs& out) {
  STD_TORCH_CHECK(max_iter >= 1, "max_iter must be at least 1");
  STD_TORCH_CHECK(check_every >= 1, "check_every must be at least 1");
  const Numbers of_tol = numbers_of(tol, "tol", cost, problems.batch);
  if (init_g) check_contiguous(*init_g, "init_g", cost, real_of(cost), of_problem(cost, {problems.m}));
  sinkhorn::ForwardParams p{};
  p.problems = problems;
  p.init_g = init_g ? init_g->const_data_ptr() : nullptr;
  p.tol = of_tol.data;
  p.tol_stride = of_tol.stride;
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
    p.history = {data(out.history), static_cast<uint8_t*>(data(out.rebuilt)), max_iter,
                 out.history.size(out.history.dim() - 1)};
  return p;
}

struct IncomingGradients {
  OptionalTensor value, transport_cost, f, g, plan;
};

struct Gradients {
  Tensor cost, a, b;

  Gradients(const Tensor& like, int64_t n, int64_t m, bool want_cost, bool want_a, bool want_b)
      : cost(make(like, want_cost, real_of(like), of_problem(like, {n, m}))),
        a(make(like, want_a, real_of(like), of_problem(like, {n}))),
        b(make(like, want_b, real_of(like), of_problem(like, {m}))) {}
};

inline const void* incoming(const OptionalTensor& t, const char* name, const Tensor& cost,
                            std::initializer_list<int64_t> sizes) {
  if (!t) return nullptr;
  check_contiguous(*t, name, cost, real_of(cost), of_problem(cost, sizes));
  return t->const_data_ptr();
}

inline sinkhorn::BackwardParams backward_params(const sinkhorn::Problems& problems, const Tensor& cost,
                                                const Tensor& potentials, const IncomingGradients& in, bool want_cost,
                                                bool want_a, bool want_b, const Gradients& out) {
  const int64_t n = problems.n, m = problems.m;
  check_contiguous(potentials, "potentials", cost, ScalarType::Double, of_problem(cost, {n + m}));
  sinkhorn::BackwardParams p{};
  p.problems = problems;
  p.potentials = potentials.const_data_ptr<double>();
  p.grad_value = incoming(in.value, "grad_value", cost, {});
  p.grad_transport_cost = incoming(in.transport_cost, "grad_transport_cost", cost, {});
  p.grad_f = incoming(in.f, "grad_f", cost, {n});
  p.grad_g = incoming(in.g, "grad_g", cost, {m});
  p.grad_plan = incoming(in.plan, "grad_plan", cost, {n, m});
  p.grad_cost = data(out.cost, want_cost);
  p.grad_a = data(out.a, want_a);
  p.grad_b = data(out.b, want_b);
  return p;
}

inline void add_history(sinkhorn::BackwardParams& p, const Tensor& cost, const Tensor& n_iter, const Tensor& history,
                        const Tensor& rebuilt) {
  const int64_t n = p.problems.n, m = p.problems.m, slot = m + (n > m ? n : m);
  STD_TORCH_CHECK(history.dim() == cost.dim(), "history must have as many dimensions as the cost");
  const int64_t max_iter = history.size(history.dim() - 2);
  check_contiguous(history, "history", cost, real_of(cost), of_problem(cost, {max_iter, slot}));
  check_contiguous(rebuilt, "rebuilt", cost, ScalarType::Byte, of_problem(cost, {max_iter}));
  check_contiguous(n_iter, "n_iter", cost, ScalarType::Long, of_problem(cost, {}));
  p.n_iter = n_iter.const_data_ptr<int64_t>();
  p.history = {const_cast<void*>(history.const_data_ptr()), const_cast<uint8_t*>(rebuilt.const_data_ptr<uint8_t>()),
               max_iter, slot};
}

}  // namespace otface::binding
