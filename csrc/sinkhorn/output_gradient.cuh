// What the unrolled and the implicit gradient share: the derivative of the outputs with respect to the potentials f, g of
// the last iterate, and directly with respect to C, a and b. With E_ij = exp((f_i + g_j - C_ij) / eps), P_ij = a_i b_j E_ij
// and p_ij the derivative of the loss by P_ij (through the plan and through <P, C>):
//
//   df_i = sum_j P_ij p_ij / eps + ...,   dC_ij = -P_ij p_ij / eps + (d transport_cost) P_ij,   da_i = sum_j b_j E_ij p_ij
//
// and f' = f + shift, g' = g - shift with shift = (<b, g> - <a, f>) / (W_a + W_b) leads back to f, g, a, b.
#pragma once

#include "sinkhorn/absorb.cuh"

namespace otface::sinkhorn {

template <class M>
struct GradientState : State<M> {
  using T = typename M::T;
  double *by_f, *by_g, *by_a, *by_b;  // [n], [m], [n], [m]: the derivatives of the loss
  T *inverse_r, *inverse_s;           // [n], [m]: E_ij = K_ij inverse_r_i inverse_s_j

  __host__ __device__ GradientState(Arena& arena, int64_t n, int64_t m, int threads)
      : State<M>(arena, n, m, threads),
        by_f(arena.take<double>(M::row_count(n))),
        by_g(arena.take<double>(M::col_count(m))),
        by_a(arena.take<double>(M::row_count(n))),
        by_b(arena.take<double>(M::col_count(m))),
        inverse_r(arena.take<T>(M::row_count(n))),
        inverse_s(arena.take<T>(M::col_count(m))) {}
};

// The incoming gradients of one problem and its outgoing ones, null where nothing was asked for. Real is their type. Found
// anew each time: kept, the addresses would take registers from K.
template <class Real>
struct Gradients {
  const BackwardParams& params;
  const Problem& p;

  OTFACE_DEVICE double value() const { return of_problem(params.grad_value); }
  OTFACE_DEVICE double transport_cost() const { return of_problem(params.grad_transport_cost); }
  OTFACE_DEVICE const Real* f() const { return in(params.grad_f, params.problems.n); }
  OTFACE_DEVICE const Real* g() const { return in(params.grad_g, params.problems.m); }
  OTFACE_DEVICE const Real* plan() const { return in(params.grad_plan, params.problems.n * params.problems.m); }
  OTFACE_DEVICE Real* cost() const { return out(params.grad_cost, params.problems.n * params.problems.m); }
  OTFACE_DEVICE Real* a() const { return out(params.grad_a, params.problems.n); }
  OTFACE_DEVICE Real* b() const { return out(params.grad_b, params.problems.m); }

 private:
  OTFACE_DEVICE double of_problem(const void* x) const {
    return x == nullptr ? 0.0 : static_cast<double>(static_cast<const Real*>(x)[p.index]);
  }
  OTFACE_DEVICE const Real* in(const void* x, int64_t count) const {
    return x == nullptr ? nullptr : static_cast<const Real*>(x) + p.index * count;
  }
  OTFACE_DEVICE Real* out(void* x, int64_t count) const {
    return x == nullptr ? nullptr : static_cast<Real*>(x) + p.index * count;
  }
};

// x inside the problem, 0 in the padding, everywhere in the gradients of the cost.
template <class M, class Real>
OTFACE_DEVICE void fill_cost_gradient(M& matrix, const Problems& all, const Problem& p, Real* out, Real x) {
  if (out == nullptr) return;
  for (int64_t i = 0; i < all.n; ++i)
    for (int64_t j = matrix.thread_in_team(); j < all.m; j += matrix.team_threads())
      out[i * all.m + j] = i < p.rows && j < p.cols ? x : Real(0);
}
template <class M, class Real>
OTFACE_DEVICE void write_nan_gradients(M& matrix, const Problems& all, const Problem& p, const Gradients<Real>& out) {
  const Real bad = static_cast<Real>(kNaN);
  fill_cost_gradient(matrix, all, p, out.cost(), bad);
  Real *a = out.a(), *b = out.b();
  for (int64_t i = matrix.thread_in_team(); a != nullptr && i < all.n; i += matrix.team_threads())
    a[i] = i < p.rows ? bad : Real(0);
  for (int64_t j = matrix.thread_in_team(); b != nullptr && j < all.m; j += matrix.team_threads())
    b[j] = j < p.cols ? bad : Real(0);
}

// Weights are compared along directions that keep the masses equal, so that a constant may be added to their gradient: its
// mean over the valid entries is taken away where `centred`.
template <class M, class Real>
OTFACE_DEVICE void write_weights_gradient(M& matrix, const double* grad, int count, int64_t size, double mean,
                                          Real* out) {
  if (out == nullptr) return;
  for (int64_t i = matrix.thread_in_team(); i < size; i += matrix.team_threads())
    out[i] = i < count ? static_cast<Real>(grad[i] - mean) : Real(0);
}

// Fills by_f, by_g, by_a, by_b; writes the direct part of dC to `grads.cost` if the plan is involved. Needs K, inverse_r and
// inverse_s, which need not be visible to the team yet; everything written is visible to it afterwards.
template <class M, class Real>
OTFACE_DEVICE void differentiate_outputs(M& matrix, GradientState<M>& state, const Problems& all, const Problem& p,
                                         const double* potentials, const Gradients<Real>& grads) {
  using T = typename M::T;
  const double by_value = grads.value();
  const Real *of_f = grads.f(), *of_g = grads.g();
  matrix.rows([&](Slot row) {
    if (!row.counts) return;
    const bool counts = row.i < p.rows && !state.empty_rows.get(row);
    const double a = static_cast<double>(state.a[row.i]);
    state.by_f[row.i] = counts ? by_value * a + (of_f == nullptr ? 0.0 : static_cast<double>(of_f[row.i])) : 0;
    state.by_a[row.i] = counts ? by_value * potentials[row.i] : 0;
  });
  matrix.cols([&](Slot col) {
    if (!col.counts) return;
    const bool counts = col.i < p.cols && !state.empty_cols.get(col);
    const double b = static_cast<double>(state.b[col.i]);
    state.by_g[col.i] = counts ? by_value * b + (of_g == nullptr ? 0.0 : static_cast<double>(of_g[col.i])) : 0;
    state.by_b[col.i] = counts ? by_value * potentials[all.n + col.i] : 0;
  });
  double sum_f[1], sum_g[1];
  matrix.template sum_rows<1>(sum_f, [&](Slot row, double* to) { to[0] += state.by_f[row.i]; });
  matrix.template sum_cols<1>(sum_g, [&](Slot col, double* to) { to[0] += state.by_g[col.i]; });
  const double shift = (sum_f[0] - sum_g[0]) / (p.mass_a + p.mass_b);
  matrix.rows([&](Slot row) {
    if (!row.counts || row.i >= p.rows) return;
    state.by_f[row.i] -= shift * static_cast<double>(state.a[row.i]);
    state.by_a[row.i] -= shift * potentials[row.i];
  });
  matrix.cols([&](Slot col) {
    if (!col.counts || col.i >= p.cols) return;
    state.by_g[col.i] += shift * static_cast<double>(state.b[col.i]);
    state.by_b[col.i] += shift * potentials[all.n + col.i];
  });
  matrix.sync();
  const Real* of_plan = grads.plan();
  if (of_plan == nullptr && grads.transport_cost() == 0) return;

  const T inverse_eps = static_cast<T>(least_of(1 / p.eps, static_cast<double>(LargestOf<T>::value)));
  const T by_cost = static_cast<T>(grads.transport_cost());
  Real* out = grads.cost();
  matrix.template reduce_entries<2, 2>(
      [&](int i, int j, T k, T* by_row, T* by_col, bool writes) {
        if (i >= p.rows || j >= p.cols) return;
        const T c = matrix.cost(i, j), a = state.a[i];
        // Between two zero weights it may be beyond all bounds, but must not spoil the sums it has no part in.
        const T e = least_of(k * state.inverse_r[i] * state.inverse_s[j], LargestOf<T>::value), b_e = state.b[j] * e;
        const T through_plan = of_plan == nullptr ? T(0) : static_cast<T>(of_plan[i * all.m + j]);
        const T by_entry = c < static_cast<T>(kInfinity) ? by_cost * c + through_plan : T(0);
        const T plan = a * b_e, by_exponent = plan * by_entry * inverse_eps;
        by_row[0] += by_exponent;
        by_row[1] += b_e * by_entry;
        by_col[0] += by_exponent;
        by_col[1] += a * e * by_entry;
        if (writes && out != nullptr) out[i * all.m + j] = static_cast<Real>(by_cost * plan - by_exponent);
      },
      [&](Slot row, const T* sums) {
        if (!row.counts) return;
        state.by_f[row.i] += static_cast<double>(sums[0]);
        state.by_a[row.i] += static_cast<double>(sums[1]);
      },
      [&](Slot col, const T* sums) {
        if (!col.counts) return;
        state.by_g[col.i] += static_cast<double>(sums[0]);
        state.by_b[col.i] += static_cast<double>(sums[1]);
      });
  matrix.sync_in_registers();
}

}  // namespace otface::sinkhorn
