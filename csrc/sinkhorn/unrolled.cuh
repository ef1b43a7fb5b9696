// The unrolled gradient: the exact derivative of the finitely many iterations that were done. For any matrix of team.cuh.
//
// Iteration t took g_{t-1} to f_t by the row-stochastic R_ij = b_j exp((f_t,i + g_{t-1},j - C_ij) / eps), and f_t to g_t by
// the column-stochastic Q_ij = a_i exp((f_t,i + g_t,j - C_ij) / eps). With F, G the derivatives of the loss by f_t, g_t:
//
//   F_i = (outputs) - sum_j Q_ij G_j,              G'_j = -sum_i R_ij F_i   (G' belongs to g_{t-1})
//   dC_ij += Q_ij G_j + R_ij F_i,   da_i -= eps * sum_j Q_ij G_j / a_i,   db_j -= eps * sum_i R_ij F_i / b_j
//
// In terms of K: Q_ij = (a_i / r_i) K_ij / s_j and R_ij = (1 / r_i) K_ij b_j / s'_j. So the reverse of an iteration is again
// one sweep (y = K (G / s), w = F / r, then K^T w), and dC is K times a sum of outer products, two per iteration. K changes
// only where the solve started anew: there the sum is multiplied out (`flush`).
//
// Per iteration: 2 n m multiply-adds for the sweep, 2 n m for the outer products, and n + m numbers of history read.
#pragma once

#include "sinkhorn/output_gradient.cuh"

namespace otface::sinkhorn {

template <class M>
struct UnrolledState : GradientState<M> {
  typename M::RowVector r, left, f_over_r;
  typename M::ColVector s, s_before, grad_g, sums;
  typename M::T* grad_f;   // [n]: F, from the outputs; f reaches them through the last iteration only
  typename M::T* s_start;  // [m]: the column sums of the iteration in which K was computed
  typename M::OuterProducts products;

  __host__ __device__ UnrolledState(Arena& arena, int64_t n, int64_t m, int threads)
      : GradientState<M>(arena, n, m, threads),
        r(arena, M::row_count(n)),
        left(arena, M::row_count(n)),
        f_over_r(arena, M::row_count(n)),
        s(arena, M::col_count(m)),
        s_before(arena, M::col_count(m)),
        grad_g(arena, M::col_count(m)),
        sums(arena, M::col_count(m)),
        grad_f(arena.take<typename M::T>(M::row_count(n))),
        s_start(arena.take<typename M::T>(M::col_count(m))),
        products(arena, n, m) {}
};

template <class M>
class Unrolled {
  using T = typename M::T;
  static_assert(M::teams_per_block == 1);  // threads that meet at a barrier go through the same stretches

 public:
  using Matrix = M;
  using State = UnrolledState<M>;
  using Params = BackwardParams;

  OTFACE_DEVICE Unrolled(M& matrix, State& state, Problem& problem, const BackwardParams& params)
      : matrix_(matrix), state_(state), problem_(problem), params_(params) {}

  OTFACE_DEVICE void run(int64_t index) {
    read_problem(matrix_, state_, params_.problems, problem_, index);
    const Problem& p = problem_;
    const Problems& all = params_.problems;
    const Gradients<T> grads{params_, p};
    const int64_t done = params_.n_iter[p.index];
    if (!p.valid || !is_finite(potentials()[0]) || done < 1 || done > params_.history.max_iter) {
      write_nan_gradients(matrix_, all, p, grads);
      return;
    }
    fill_cost_gradient(matrix_, all, p, grads.cost(), T(0));
    for (int end = static_cast<int>(done); end >= 1;) {
      int begin = end;
      while (rebuilt(begin) == 0) --begin;
      reverse_stretch(begin, end, grads);
      end = begin - 1;
    }
    matrix_.sync_in_registers();
    write_weights_gradient(matrix_, state_.by_a, p.rows, all.n, 0.0, grads.a());
    write_weights_gradient(matrix_, state_.by_b, p.cols, all.m, 0.0, grads.b());
  }

 private:
  OTFACE_DEVICE const double* potentials() const {
    return params_.potentials + problem_.index * (params_.problems.n + params_.problems.m);
  }
  OTFACE_DEVICE uint8_t rebuilt(int iteration) const {
    return params_.history.rebuilt[problem_.index * params_.history.max_iter + iteration - 1];
  }
  OTFACE_DEVICE const T* slot(int iteration) const {
    const HistoryView& h = params_.history;
    return static_cast<const T*>(h.slots) + (problem_.index * h.max_iter + iteration - 1) * h.slot;
  }
  OTFACE_DEVICE void load_r(int iteration) {
    const T* in = slot(iteration) + params_.problems.m;
    matrix_.rows([&](Slot row) { state_.r[row.k] = row.i < problem_.rows ? in[row.i] : T(1); });
  }
  OTFACE_DEVICE void load_s(int iteration, typename M::ColVector& s) {
    const T* in = slot(iteration);
    matrix_.cols([&](Slot col) { s[col.k] = col.i < problem_.cols ? in[col.i] : T(1); });
  }
  OTFACE_DEVICE void load_start_g(int iteration) {
    const T* in = slot(iteration);
    matrix_.cols([&](Slot col) {
      if (!col.counts) return;
      const bool inside = col.i < problem_.cols;
      state_.g0[col.i] =
          inside ? static_cast<double>(in[col.i]) + static_cast<double>(in[params_.problems.m + col.i]) : 0.0;
    });
    matrix_.sync();
  }

  // Iterations begin..end, which share one K: begin is where it was computed anew.
  OTFACE_DEVICE void reverse_stretch(int begin, int end, const Gradients<T>& grads) {
    const bool columns = rebuilt(begin) == kRowsAndColumnsRebuilt;
    load_start_g(begin);
    absorb(matrix_, state_, state_.s, true, [columns](bool) { return columns; });
    matrix_.cols([&](Slot col) {
      if (col.counts) state_.s_start[col.i] = state_.s[col.k];
    });
    matrix_.sync_in_registers();
    load_sums(end, begin, state_.s);
    if (end == params_.n_iter[problem_.index]) start_from_outputs(grads);
    matrix_.clear(state_.products);  // it is clear: said so that its registers are free for what comes before
    for (int t = end; t >= begin; --t) {
      // What iteration t - 1 left is asked for here and needed at the end of the loop.
      if (t > begin) load_s_of(t - 1, begin, state_.s_before);
      reverse_columns(grads);
      if (t == begin) break;
      matrix_.cols([&](Slot col) { state_.x[col.k] = simt::quotient(state_.b[col.i], state_.s_before[col.k]); });
      reverse_rows(state_.s_before, grads);
      matrix_.replace(state_.s, state_.s_before, true);
      load_r_of(t - 1, begin);
    }
    if (columns) {
      // The two halves of this iteration belong to two matrices: K is the one of its columns, now comes that of its rows.
      matrix_.flush(state_.products, grads.cost(), params_.problems.m);
      load_start_g(begin);
      matrix_.fill(state_.f0, state_.g0);
      matrix_.clear(state_.products);
      matrix_.cols([&](Slot col) { state_.x[col.k] = state_.b[col.i]; });
      matrix_.sync();
      matrix_.sweep(
          state_.x, [&](Slot row, T, bool&) { return state_.f_over_r[row.k]; },
          [&](Slot col, T sum, bool&) { state_.sums[col.k] = sum; });
    }
    // K was computed from g itself, whose scaling is 1.
    matrix_.cols([&](Slot col) {
      state_.s_before[col.k] = 1;
      state_.x[col.k] = state_.b[col.i];
    });
    reverse_rows(state_.s_before, grads);
    matrix_.flush(state_.products, grads.cost(), params_.problems.m);
  }

  OTFACE_DEVICE void load_s_of(int t, int begin, typename M::ColVector& s) {
    if (t > begin) {
      load_s(t, s);
    } else {
      matrix_.cols([&](Slot col) { s[col.k] = state_.s_start[col.i]; });
    }
  }
  OTFACE_DEVICE void load_r_of(int t, int begin) {
    if (t > begin) {
      load_r(t);
    } else {
      matrix_.rows([&](Slot row) { state_.r[row.k] = 1; });
    }
  }
  OTFACE_DEVICE void load_sums(int t, int begin, typename M::ColVector& s) {
    load_s_of(t, begin, s);
    load_r_of(t, begin);
  }

  OTFACE_DEVICE void start_from_outputs(const Gradients<T>& grads) {
    matrix_.rows([&](Slot row) {
      if (row.counts) state_.inverse_r[row.i] = simt::quotient(T(1), state_.r[row.k]);
    });
    matrix_.cols([&](Slot col) {
      if (col.counts) state_.inverse_s[col.i] = simt::quotient(T(1), state_.s[col.k]);
    });
    differentiate_outputs(matrix_, state_, params_.problems, problem_, potentials(), grads);
    matrix_.rows([&](Slot row) {
      if (row.counts) state_.grad_f[row.i] = static_cast<T>(state_.by_f[row.i]);
    });
    matrix_.cols([&](Slot col) { state_.grad_g[col.k] = static_cast<T>(state_.by_g[col.i]); });
  }

  // The sum of a row or column without weight may be infinite, and counts only in the gradient of that weight.
  //
  // The columns half of an iteration: x = G / s, then one sweep gives F and K^T (F / r). The outer product is (a / r) x^T.
  OTFACE_DEVICE void reverse_columns(const Gradients<T>& grads) {
    matrix_.cols([&](Slot col) { state_.x[col.k] = simt::quotient(state_.grad_g[col.k], state_.s[col.k]); });
    matrix_.rows([&](Slot row) { state_.left[row.k] = simt::quotient(state_.a[row.i], state_.r[row.k]); });
    matrix_.sync();
    matrix_.add_product(state_.products, state_.left, state_.x, grads.cost(), params_.problems.m);
    matrix_.sweep(
        state_.x,
        [&](Slot row, T y, bool&) {
          const T r = state_.r[row.k];
          const T left = state_.left[row.k];
          const T w = simt::quotient(state_.grad_f[row.i] - (left > 0 ? left * y : T(0)), r);
          if (row.keeps) state_.f_over_r[row.k] = w;
          if (row.counts) state_.by_a[row.i] -= problem_.eps * static_cast<double>(simt::quotient(y, r));
          return w;
        },
        [&](Slot col, T sum, bool&) { state_.sums[col.k] = sum; });
    matrix_.sync_in_registers();  // others may still be reading grad_f
    matrix_.rows([&](Slot row) {
      if (row.counts) state_.grad_f[row.i] = 0;
    });
  }

  // The rows half: G of the iteration before, with column sums s_before and x = b / s_before. The outer product is
  // (F / r) x^T.
  OTFACE_DEVICE void reverse_rows(const typename M::ColVector& s_before, const Gradients<T>& grads) {
    matrix_.cols([&](Slot col) {
      const T x = state_.x[col.k];
      state_.grad_g[col.k] = x > 0 ? -x * state_.sums[col.k] : T(0);
      if (col.counts)
        state_.by_b[col.i] -= problem_.eps * static_cast<double>(simt::quotient(state_.sums[col.k], s_before[col.k]));
    });
    matrix_.add_product(state_.products, state_.f_over_r, state_.x, grads.cost(), params_.problems.m);
  }

  M& matrix_;
  State& state_;
  Problem& problem_;
  const BackwardParams& params_;
};

}  // namespace otface::sinkhorn
