// The implicit gradient: the derivative at the fixed point, whatever the number of iterations that led there. For a matrix
// in memory, of doubles: the adjoint system is nearly singular at small eps, and a residual in float would not get below its
// rounding. `Real` is the type of the arguments and results.
//
// With E_ij = exp((f_i + g_j - C_ij) / eps), rho_i = sum_j b_j E_ij, sigma_j = sum_i a_i E_ij, the reverse of infinitely many
// iterations (unrolled.cuh) is the solution of
//
//   F = (f outputs) - a * (E X),   G = (g outputs) - b * (E^T (F / rho)),   X = G / sigma.
//
// Eliminating F leaves S x = h over the columns that have weight (X = b x there, X = (g outputs) / sigma elsewhere):
//
//   S x = b sigma x - b * (E^T ((a / rho) * (E (b x)))),
//
// symmetric, positive semidefinite, with S 1 = 0: conjugate gradients, preconditioned by the diagonal b sigma, on the
// complement of that direction. One step is one sweep over E: 2 n m multiply-adds.
#pragma once

#include "sinkhorn/output_gradient.cuh"

namespace otface::sinkhorn {

template <class M>
struct ImplicitState : GradientState<M> {
  typename M::RowVector rho, f_over_rho;
  typename M::ColVector sigma, solution, residual, direction, applied, sums;

  __host__ __device__ ImplicitState(Arena& arena, int64_t n, int64_t m, int threads)
      : GradientState<M>(arena, n, m, threads),
        rho(arena, n),
        f_over_rho(arena, n),
        sigma(arena, m),
        solution(arena, m),
        residual(arena, m),
        direction(arena, m),
        applied(arena, m),
        sums(arena, m) {}
};

template <class M, class Real>
class Implicit {
  static constexpr double kSingular = 1e-13;

 public:
  using Matrix = M;
  using State = ImplicitState<M>;
  using Params = BackwardParams;

  OTFACE_DEVICE Implicit(M& matrix, State& state, Problem& problem, const BackwardParams& params)
      : matrix_(matrix), s_(state), p_(problem), params_(params) {}

  OTFACE_DEVICE void run(int64_t index) {
    const Problems& all = params_.problems;
    read_problem(matrix_, s_, all, p_, index);
    const Gradients<Real> grads{params_, p_};
    const double* potentials = params_.potentials + p_.index * (all.n + all.m);
    const bool solved = p_.valid && is_finite(potentials[0]);
    const bool converged = solved && differentiate(potentials, grads);
    if (!converged) write_nan_gradients(matrix_, all, p_, grads);
    // Where the problem itself has no solution there was nothing to solve.
    if (matrix_.thread_in_team() == 0) params_.converged[p_.index] = converged || !solved;
  }

 private:
  // False when the adjoint system was not solved to the tolerance.
  OTFACE_DEVICE bool differentiate(const double* potentials, const Gradients<Real>& grads) {
    const Problems& all = params_.problems;
    matrix_.rows([&](Slot row) {
      s_.f0[row.i] = potentials[row.i];
      s_.inverse_r[row.i] = 1;
    });
    matrix_.cols([&](Slot col) {
      s_.g0[col.i] = potentials[all.n + col.i];
      s_.inverse_s[col.i] = 1;
      s_.x[col.i] = s_.b[col.i];
    });
    matrix_.sync();
    matrix_.fill(s_.f0, s_.g0);
    matrix_.sync();
    // A row or column without an allowed pair has the sum 0 and takes no part.
    matrix_.sweep(
        s_.x,
        [&](Slot row, double y, bool&) {
          if (row.keeps) s_.rho[row.i] = y;
          if (row.keeps) s_.empty_rows.set(row, !(y > 0));
          return s_.a[row.i];
        },
        [&](Slot col, double sum, bool&) {
          s_.sigma[col.i] = sum > 0 ? sum : 1;
          s_.empty_cols.set(col, !(sum > 0));
        });
    fill_cost_gradient(matrix_, all, p_, grads.cost(), Real(0));
    differentiate_outputs(matrix_, s_, all, p_, potentials, grads);
    matrix_.rows([&](Slot row) { s_.rho[row.i] = s_.rho[row.i] > 0 ? s_.rho[row.i] : 1; });
    if (!solve()) return false;

    matrix_.cols([&](Slot col) {
      const int j = col.i;
      s_.x[j] = s_.b[j] > 0 ? s_.b[j] * s_.solution[j] : s_.by_g[j] / s_.sigma[j];
    });
    matrix_.sync();
    sweep_to_f(true);
    matrix_.cols([&](Slot col) { s_.by_b[col.i] -= p_.eps * s_.sums[col.i]; });
    double of_a[1], of_b[1];
    matrix_.template sum_rows<1>(of_a, [&](Slot row, double* to) { to[0] += s_.by_a[row.i]; });
    matrix_.template sum_cols<1>(of_b, [&](Slot col, double* to) { to[0] += s_.by_b[col.i]; });
    write_weights_gradient(matrix_, s_.by_a, p_.rows, all.n, of_a[0] / p_.rows, grads.a());
    write_weights_gradient(matrix_, s_.by_b, p_.cols, all.m, of_b[0] / p_.cols, grads.b());
    Real* cost = grads.cost();
    if (cost == nullptr) return true;
    matrix_.template reduce_entries<0, 0>(
        [&](int i, int j, double e, double*, double*, bool) {
          const double through = s_.a[i] * (e * s_.x[j]) + s_.b[j] * (e * s_.f_over_rho[i]);
          Real& out = cost[i * all.m + j];
          out = static_cast<Real>(static_cast<double>(out) + through);
        },
        [](Slot, const double*) {}, [](Slot, const double*) {});
    return true;
  }

  // With X in x: f_over_rho = F / rho with F = (f outputs) - a * (E X); sums = E^T (F / rho). The share of `a` is
  // -eps * (E X).
  OTFACE_DEVICE void sweep_to_f(bool add_to_a) {
    matrix_.sweep(
        s_.x,
        [&](Slot row, double y, bool&) {
          const int i = row.i;
          const double scaled = (s_.by_f[i] - s_.a[i] * y) / s_.rho[i];
          if (row.keeps) s_.f_over_rho[i] = scaled;
          if (row.keeps && add_to_a) s_.by_a[i] -= p_.eps * y;
          return scaled;
        },
        [&](Slot col, double sum, bool&) { s_.sums[col.i] = sum; });
  }

  // Conjugate gradients from x = 0. The norm is that of the preconditioner; a residual counts against both parts of h, since
  // for the value alone h is nothing but the rounding of their difference.
  OTFACE_DEVICE bool solve() {
    matrix_.cols([&](Slot col) {
      const int j = col.i;
      s_.x[j] = s_.b[j] > 0 ? 0.0 : s_.by_g[j] / s_.sigma[j];
    });
    matrix_.sync();
    sweep_to_f(false);
    double norms[4];  // of the g part, of the f part; the sum of the right-hand side and of the weights
    matrix_.template sum_cols<4>(norms, [&](Slot col, double* to) {
      const int j = col.i;
      s_.solution[j] = 0;
      s_.residual[j] = 0;
      if (!(s_.b[j] > 0)) return;
      const double through_f = s_.b[j] * s_.sums[j], diagonal = s_.b[j] * s_.sigma[j];
      s_.residual[j] = s_.by_g[j] - through_f;
      to[0] += s_.by_g[j] * s_.by_g[j] / diagonal;
      to[1] += through_f * through_f / diagonal;
      to[2] += s_.residual[j];
      to[3] += diagonal;
    });
    const double mean = norms[2] / norms[3];
    const double bound = params_.tol * params_.tol * (norms[0] > norms[1] ? norms[0] : norms[1]);
    double rho[1];
    matrix_.template sum_cols<1>(rho, [&](Slot col, double* to) {
      const int j = col.i;
      s_.residual[j] -= s_.b[j] * s_.sigma[j] * mean;
      s_.direction[j] = preconditioned(j);
      to[0] += s_.residual[j] * s_.direction[j];
    });
    for (int64_t step = 0; step < params_.max_iter; ++step) {
      if (rho[0] <= bound) return true;
      apply();
      double products[2];  // curvature, squared length
      matrix_.template sum_cols<2>(products, [&](Slot col, double* to) {
        const int j = col.i;
        to[0] += s_.direction[j] * s_.applied[j];
        to[1] += s_.direction[j] * s_.direction[j] * s_.b[j] * s_.sigma[j];
      });
      // Along a direction in which S is zero to rounding, as between blocks that exchange no mass, nothing can be solved.
      if (!(products[0] > kSingular * products[1])) return false;
      const double length = rho[0] / products[0];
      double next[1];
      matrix_.template sum_cols<1>(next, [&](Slot col, double* to) {
        const int j = col.i;
        s_.solution[j] += length * s_.direction[j];
        s_.residual[j] -= length * s_.applied[j];
        to[0] += s_.residual[j] * preconditioned(j);
      });
      const double ratio = next[0] / rho[0];
      matrix_.cols([&](Slot col) {
        const int j = col.i;
        s_.direction[j] = preconditioned(j) + ratio * s_.direction[j];
      });
      rho[0] = next[0];
    }
    return rho[0] <= bound;
  }

  // applied = S direction
  OTFACE_DEVICE void apply() {
    matrix_.cols([&](Slot col) { s_.x[col.i] = s_.b[col.i] * s_.direction[col.i]; });
    matrix_.sync();
    matrix_.sweep(
        s_.x, [&](Slot row, double y, bool&) { return s_.a[row.i] / s_.rho[row.i] * y; },
        [&](Slot col, double sum, bool&) {
          const int j = col.i;
          s_.applied[j] = s_.b[j] * (s_.sigma[j] * s_.direction[j] - sum);
        });
  }

  OTFACE_DEVICE double preconditioned(int j) const {
    return s_.b[j] > 0 ? s_.residual[j] / (s_.b[j] * s_.sigma[j]) : 0.0;
  }

  M& matrix_;
  State& s_;
  Problem& p_;
  const BackwardParams& params_;
};

}  // namespace otface::sinkhorn
