// The solve, for any matrix of team.cuh. One iteration, from the column sums s of the one before:
//
//   x_j = b_j / s_j,   r = K x,   w_i = a_i / r_i,   s = K^T w          f_i = f0_i - eps log r_i,  g_j = g0_j - eps log s_j
//
// 2 n m multiply-adds; memory and threads are those of the matrix. An iteration whose sums leave the band is thrown away
// and done again in the log domain (absorb.cuh).
#pragma once

#include "sinkhorn/absorb.cuh"

namespace otface::sinkhorn {

template <class M>
struct ForwardState : State<M> {
  using T = typename M::T;
  typename M::RowVector r, cost_of_row;
  typename M::ColVector s, s_next;
  T* r_before;  // [n]: r of the iterate whose error is asked for; in the end, that of the result
  T* x_of_all;  // [m]: x where everyone can read it

  __host__ __device__ ForwardState(Arena& arena, int64_t n, int64_t m, int threads)
      : State<M>(arena, n, m, threads),
        r(arena, M::row_count(n)),
        cost_of_row(arena, M::row_count(n)),
        s(arena, M::col_count(m)),
        s_next(arena, M::col_count(m)),
        r_before(arena.take<T>(M::row_count(n))),
        x_of_all(arena.take<T>(M::col_count(m))) {}
};

template <class M>
class Forward {
  using T = typename M::T;

 public:
  using Matrix = M;
  using State = ForwardState<M>;
  using Params = ForwardParams;

  OTFACE_DEVICE Forward(M& matrix, State& state, Problem& problem, const ForwardParams& params)
      : matrix_(matrix), state_(state), problem_(problem), params_(params) {}

  OTFACE_DEVICE void run(int64_t index) {
    read_problem(matrix_, state_, params_.problems, problem_, index);
    const Problem& p = problem_;
    const T* init = static_cast<const T*>(params_.init_g);
    bool finite = true;
    matrix_.cols([&](Slot col) {
      const bool inside = col.i < p.cols;
      const T g = init != nullptr && inside ? init[p.index * params_.problems.m + col.i] : T(0);
      finite = finite && is_finite(g);
      if (col.counts) state_.g0[col.i] = static_cast<double>(g);
      state_.s[col.k] = 1;
    });
    matrix_.rows([&](Slot row) { state_.r[row.k] = 1; });
    bool solved = matrix_.all(finite) && p.valid;

    const int max_iter = to_int(params_.max_iter), check_every = to_int(params_.check_every);
    int iteration = 0, next_look = tol() > 0 ? check_every : kMostIterations + 1;
    bool active = solved, starts_anew = solved, seems_done = false;
    bool ended = false;  // r of the result is in r_before: another team's sweeps may write over it
    double error = 0;
    for (;;) {
      if (matrix_.any_in_domain(starts_anew)) {
        const bool ok = start_anew(starts_anew, iteration);
        solved = solved && (ok || !starts_anew);
        iteration += starts_anew ? 1 : 0;
      }
      active = active && solved && iteration < max_iter;
      keep_r(!active && !ended);
      ended = ended || !active;
      const bool goes_on = matrix_.any_in_domain(active);
      if (!goes_on || matrix_.any_in_domain(seems_done)) {
        error = measure(ended || seems_done);
        if (!goes_on) break;
        // Only what is reported may end a solve.
        ended = ended || (seems_done && error <= tol());
        active = active && !ended;
        seems_done = false;
        if (!matrix_.any_in_domain(active)) break;
      }
      const bool looks = active && iteration == next_look;
      if (matrix_.any_in_domain(looks)) {
        keep_r(looks);
        matrix_.sync_in_memory();  // before the sweep writes r
      }
      const bool in_band = matrix_.sweep(
          state_.x, state_.empty_rows,
          [&](Slot row, T y, bool& ok) {
            ok = ok && within_band(y);
            if (row.keeps) state_.r[row.k] = y;
            return simt::quotient(state_.a[row.i], y);
          },
          state_.empty_cols,
          [&](Slot col, T sum, bool& ok) {
            ok = ok && within_band(sum);
            state_.s_next[col.k] = sum;
            state_.x[col.k] = simt::quotient(state_.b[col.i], sum);
          });
      if (matrix_.any_in_domain(looks)) {
        // The row sums of this sweep tell how far the plan of the last iteration was from its row marginals. They are
        // rounded in another way than the error that is reported: where they are small enough, that one is asked for, and
        // the sweep is done again if it is not.
        const double violation = row_violation();
        next_look += looks ? check_every : 0;
        seems_done = looks && violation <= tol();
      }
      const bool accepted = active && in_band && !seems_done;
      matrix_.replace(state_.s, state_.s_next, accepted);
      if (accepted) {
        record(iteration);
        ++iteration;
      }
      if (params_.history.slots != nullptr) matrix_.sync_in_memory();  // before the next sweep writes r
      starts_anew = active && !in_band && !seems_done;
    }
    finish(solved, iteration, error);
  }

 private:
  // More are never done; an int takes one register less.
  static constexpr int kMostIterations = 0x40000000;
  OTFACE_DEVICE static int to_int(int64_t x) { return x < kMostIterations ? static_cast<int>(x) : kMostIterations; }
  OTFACE_DEVICE double tol() const { return params_.tol[problem_.index * params_.tol_stride]; }

  // An iteration in the log domain from g = g0 - eps log s, rounded to what the history can hold: the gradient then sees
  // the same bits.
  OTFACE_DEVICE bool start_anew(bool mask, int iteration) {
    const Problem& p = problem_;
    const HistoryView& history = params_.history;
    const bool keeps_history = mask && history.slots != nullptr;
    const int64_t place = p.index * history.max_iter + iteration;
    T* slot = static_cast<T*>(history.slots) + place * history.slot;
    matrix_.cols([&](Slot col) {
      if (!mask || !col.counts) return;
      const double g = state_.g0[col.i] - p.eps * simt::log_of(static_cast<double>(state_.s[col.k]));
      const T high = static_cast<T>(g), low = static_cast<T>(g - static_cast<double>(high));
      state_.g0[col.i] = static_cast<double>(high) + static_cast<double>(low);
      if (!keeps_history || col.i >= p.cols) return;
      slot[col.i] = high;
      slot[params_.problems.m + col.i] = low;
    });
    matrix_.rows([&](Slot row) {
      if (mask) state_.r[row.k] = 1;
    });
    matrix_.sync();
    const Absorbed absorbed = absorb(matrix_, state_, state_.s, mask, [](bool in_band) { return !in_band; });
    if (keeps_history && matrix_.thread_in_team() == 0)
      history.rebuilt[place] = absorbed.columns ? kRowsAndColumnsRebuilt : kRowsRebuilt;
    matrix_.cols([&](Slot col) { state_.x[col.k] = simt::quotient(state_.b[col.i], state_.s[col.k]); });
    matrix_.sync();
    return absorbed.ok;
  }

  OTFACE_DEVICE void keep_r(bool mask) {
    matrix_.rows([&](Slot row) {
      if (mask && row.counts) state_.r_before[row.i] = state_.r[row.k];
    });
  }

  OTFACE_DEVICE void record(int iteration) {
    const HistoryView& history = params_.history;
    if (history.slots == nullptr) return;
    const int64_t place = problem_.index * history.max_iter + iteration;
    T* slot = static_cast<T*>(history.slots) + place * history.slot;
    matrix_.cols([&](Slot col) {
      if (col.counts && col.i < problem_.cols) slot[col.i] = state_.s[col.k];
    });
    matrix_.rows([&](Slot row) {
      if (row.counts && row.i < problem_.rows) slot[params_.problems.m + row.i] = state_.r[row.k];
    });
    if (matrix_.thread_in_team() == 0) history.rebuilt[place] = 0;
  }

  // || P 1 - a ||_1 / W of the iterate with row sums r_before, when r are the row sums after its column update.
  OTFACE_DEVICE double row_violation() {
    double sum[1];
    matrix_.template sum_rows<1>(sum, [&](Slot row, double* to) {
      const double ratio = static_cast<double>(state_.r[row.k]) / static_cast<double>(state_.r_before[row.i]);
      to[0] += static_cast<double>(state_.a[row.i]) * fabs(ratio - 1);
    });
    return sum[0] / problem_.mass_a;
  }

  // The error of the current iterate: row i of the plan is (a_i / r_i) K_ij x_j. Its r is in r_before already where
  // `r_is_kept`. Leaves x, r and r_before as an iteration finds them.
  OTFACE_DEVICE double measure(bool r_is_kept) {
    matrix_.cols([&](Slot col) {
      const T x = simt::quotient(state_.b[col.i], state_.s[col.k]);
      state_.x[col.k] = x;
      if (col.counts) state_.x_of_all[col.i] = x;
    });
    keep_r(!r_is_kept);
    matrix_.sync();
    matrix_.template reduce_entries<1, 0>(
        [&](int, int j, T k, T* by_row, T*, bool) { by_row[0] += k * state_.x_of_all[j]; },
        [&](Slot row, const T* sums) {
          if (row.keeps) state_.r[row.k] = sums[0];
        },
        [](Slot, const T*) {});
    double violation[1];
    matrix_.template sum_rows<1>(violation, [&](Slot row, double* to) {
      const double a = static_cast<double>(state_.a[row.i]), scale = a / static_cast<double>(state_.r_before[row.i]);
      to[0] += fabs(scale * static_cast<double>(state_.r[row.k]) - a);
    });
    matrix_.rows([&](Slot row) { state_.r[row.k] = state_.r_before[row.i]; });
    matrix_.sync_in_memory();  // before a sweep writes r
    return violation[0] / problem_.mass_a;
  }

  // After `measure`, which has left x_of_all and the r of the result in r_before.
  OTFACE_DEVICE void finish(bool solved, int iteration, double error) {
    const Problem& p = problem_;
    const Problems& all = params_.problems;
    double cost = cost_of_plan(1);
    const bool too_large = solved && !is_finite(cost);
    if (matrix_.any_in_domain(too_large)) {
      const double of_small_costs = cost_of_plan(Extremes<T>::small_cost);
      if (too_large) cost = of_small_costs;
    }

    // f and g, shifted so that <a, f> = <b, g>. Without an allowed pair, a potential is 0: marked by infinity until then.
    matrix_.rows([&](Slot row) {
      if (!row.counts) return;
      const double f = state_.f0[row.i] - p.eps * simt::log_of(static_cast<double>(state_.r_before[row.i]));
      state_.f0[row.i] = state_.empty_rows.get(row) ? kInfinity : f;
    });
    matrix_.cols([&](Slot col) {
      if (!col.counts) return;
      const double g = state_.g0[col.i] - p.eps * simt::log_of(static_cast<double>(state_.s[col.k]));
      state_.g0[col.i] = state_.empty_cols.get(col) ? kInfinity : g;
    });
    matrix_.sync_in_registers();
    double af[1], bg[1];
    matrix_.template sum_rows<1>(af, [&](Slot row, double* to) {
      if (state_.f0[row.i] < kInfinity) to[0] += static_cast<double>(state_.a[row.i]) * state_.f0[row.i];
    });
    matrix_.template sum_cols<1>(bg, [&](Slot col, double* to) {
      if (state_.g0[col.i] < kInfinity) to[0] += static_cast<double>(state_.b[col.i]) * state_.g0[col.i];
    });
    const double shift = (bg[0] - af[0]) / (p.mass_a + p.mass_b);

    if (p.exists) {
      double* potentials = params_.potentials + p.index * (all.n + all.m);
      write_potentials(state_.f0, p.rows, all.n, shift, solved, potentials,
                       static_cast<T*>(params_.f) + p.index * all.n);
      write_potentials(state_.g0, p.cols, all.m, -shift, solved, potentials + all.n,
                       static_cast<T*>(params_.g) + p.index * all.m);
      if (matrix_.thread_in_team() == 0) {
        const auto write = [&](void* out, double x) {
          static_cast<T*>(out)[p.index] = static_cast<T>(solved ? x : kNaN);
        };
        write(params_.value, af[0] + bg[0] + (p.mass_a - p.mass_b) * shift);
        write(params_.transport_cost, cost);
        write(params_.error, error);
        params_.n_iter[p.index] = solved ? iteration : 0;
        const bool reached = tol() > 0
                                 ? error <= tol()
                                 : error * error <= RoundingLevel<T>::value * static_cast<double>(p.rows + p.cols);
        params_.converged[p.index] = solved && reached;
      }
    }
  }

  // `shrink` is a power of two by which costs are multiplied as they are read.
  OTFACE_DEVICE double cost_of_plan(T shrink) {
    matrix_.template reduce_entries<1, 0>(
        [&](int i, int j, T k, T* by_row, T*, bool) {
          const T c = least_of(matrix_.cost(i, j), LargestOf<T>::value);  // forbidden: 0 times a finite number
          by_row[0] += k * state_.x_of_all[j] * (c * shrink);
        },
        [&](Slot row, const T* sums) {
          if (row.keeps) state_.cost_of_row[row.k] = sums[0];
        },
        [](Slot, const T*) {});
    double cost[1];
    matrix_.template sum_rows<1>(cost, [&](Slot row, double* to) {
      const double scale = static_cast<double>(state_.a[row.i]) / static_cast<double>(state_.r_before[row.i]);
      to[0] += scale * static_cast<double>(state_.cost_of_row[row.k]);
    });
    return cost[0] / static_cast<double>(shrink);
  }

  OTFACE_DEVICE void write_potentials(const double* x, int count, int64_t size, double shift, bool solved,
                                      double* potentials, T* out) const {
    for (int64_t i = matrix_.thread_in_team(); i < size; i += matrix_.team_threads()) {
      double y = 0;
      if (i < count) y = !solved ? kNaN : x[i] < kInfinity ? x[i] + shift : 0.0;
      potentials[i] = y;
      out[i] = static_cast<T>(y);
    }
  }

  M& matrix_;
  State& state_;
  Problem& problem_;
  const ForwardParams& params_;
};

}  // namespace otface::sinkhorn
