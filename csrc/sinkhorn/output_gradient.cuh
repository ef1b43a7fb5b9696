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

// The incoming gradients of one problem and its outgoing ones, null where nothing was asked for. Real is their type.
template <class Real>
struct Gradients {
  double value = 0, transport_cost = 0;
  const Real *f, *g, *plan;  // [n], [m], [n, m]
  Real *cost, *a, *b;        // [n, m], [n], [m]

  OTFACE_DEVICE Gradients(const BackwardParams& params, int64_t index) {
    const int64_t n = params.problems.n, m = params.problems.m;
    const auto in = [&](const void* p, int64_t count) {
      return p == nullptr ? nullptr : static_cast<const Real*>(p) + index * count;
    };
    const auto out = [&](void* p, int64_t count) {
      return p == nullptr ? nullptr : static_cast<Real*>(p) + index * count;
    };
    if (params.grad_value != nullptr) value = static_cast<double>(*in(params.grad_value, 1));
    if (params.grad_transport_cost != nullptr) transport_cost = static_cast<double>(*in(params.grad_transport_cost, 1));
    f = in(params.grad_f, n);
    g = in(params.grad_g, m);
    plan = in(params.grad_plan, n * m);
    cost = out(params.grad_cost, n * m);
    a = out(params.grad_a, n);
    b = out(params.grad_b, m);
  }
  OTFACE_DEVICE bool involves_plan() const { return plan != nullptr || transport_cost != 0; }
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
  fill_cost_gradient(matrix, all, p, out.cost, bad);
  for (int64_t i = matrix.thread_in_team(); out.a != nullptr && i < all.n; i += matrix.team_threads())
    out.a[i] = i < p.rows ? bad : Real(0);
  for (int64_t j = matrix.thread_in_team(); out.b != nullptr && j < all.m; j += matrix.team_threads())
    out.b[j] = j < p.cols ? bad : Real(0);
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
// inverse_s, visible to the team; everything written is visible to it afterwards.
template <class M, class Real>
OTFACE_DEVICE void differentiate_outputs(M& matrix, GradientState<M>& state, const Problems& all, const Problem& p,
                                         const double* potentials, const Gradients<Real>& grads) {
  using T = typename M::T;
  matrix.rows([&](Slot row) {
    if (!row.counts) return;
    const bool counts = row.i < p.rows && !state.empty_rows.get(row);
    const double a = static_cast<double>(state.a[row.i]);
    state.by_f[row.i] = counts ? grads.value * a + (grads.f == nullptr ? 0.0 : static_cast<double>(grads.f[row.i])) : 0;
    state.by_a[row.i] = counts ? grads.value * potentials[row.i] : 0;
  });
  matrix.cols([&](Slot col) {
    if (!col.counts) return;
    const bool counts = col.i < p.cols && !state.empty_cols.get(col);
    const double b = static_cast<double>(state.b[col.i]);
    state.by_g[col.i] = counts ? grads.value * b + (grads.g == nullptr ? 0.0 : static_cast<double>(grads.g[col.i])) : 0;
    state.by_b[col.i] = counts ? grads.value * potentials[all.n + col.i] : 0;
  });
  matrix.sync();
  double of_f[1], of_g[1];
  matrix.template sum_rows<1>(of_f, [&](Slot row, double* to) { to[0] += state.by_f[row.i]; });
  matrix.template sum_cols<1>(of_g, [&](Slot col, double* to) { to[0] += state.by_g[col.i]; });
  const double shift = (of_f[0] - of_g[0]) / (p.mass_a + p.mass_b);
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
  if (!grads.involves_plan()) return;

  const T inverse_eps = static_cast<T>(least_of(1 / p.eps, static_cast<double>(LargestOf<T>::value)));
  const T by_cost = static_cast<T>(grads.transport_cost);
  matrix.template reduce_entries<2, 2>(
      [&](int i, int j, T k, T* by_row, T* by_col, bool writes) {
        if (i >= p.rows || j >= p.cols) return;
        const T c = matrix.cost(i, j), a = state.a[i], b_e = state.b[j] * (k * state.inverse_r[i] * state.inverse_s[j]);
        const T through_plan = grads.plan == nullptr ? T(0) : static_cast<T>(grads.plan[i * all.m + j]);
        const T by_entry = c < static_cast<T>(kInfinity) ? by_cost * c + through_plan : T(0);
        const T plan = a * b_e, by_exponent = plan * by_entry * inverse_eps;
        by_row[0] += by_exponent;
        by_row[1] += b_e * by_entry;
        by_col[0] += by_exponent;
        by_col[1] += a * (k * state.inverse_r[i] * state.inverse_s[j]) * by_entry;
        if (writes && grads.cost != nullptr)
          grads.cost[i * all.m + j] = static_cast<Real>(by_cost * plan - by_exponent);
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
  matrix.sync();
}

}  // namespace otface::sinkhorn
