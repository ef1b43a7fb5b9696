// The implicit gradient: the derivative at the fixed point, whatever the number of iterations that led there.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// With E_ij = exp((f_i + g_j - C_ij) / eps), rho_i = sum_j b_j E_ij, sigma_j = sum_i a_i E_ij, the reverse of infinitely many
// iterations (cpu_unrolled.h) is the solution of
//
//   F = (f outputs) - a * (E X),   G = (g outputs) - b * (E^T (F / rho)),   X = G / sigma.
//
// Eliminating F leaves S x = h over the columns that have weight (X = b x there, X = (g outputs) / sigma elsewhere):
//
//   S x = b sigma x - b * (E^T ((a / rho) * (E (b x)))),
//
// symmetric, positive semidefinite, with S 1 = 0: conjugate gradients, preconditioned by the diagonal b sigma, on the
// complement of that direction. One step is one sweep over E. Everything is done in double, for float costs too: S is
// nearly singular at small eps, and a residual in float would not get below its rounding.
#pragma once

#include "sinkhorn/cpu_gradient.h"

namespace otface::sinkhorn {
namespace {

template <class Real>
class ImplicitGradient {
 public:
  // False when the adjoint system was not solved to the tolerance: the gradients are NaN then.
  bool run(const BackwardParams& params, int64_t index, const Executor* executor) {
    const Problems& all = params.problems;
    problem_.read(all, index);
    const Problem<double>& p = problem_;
    const GradientViews<Real> views(params, p);
    const double* potentials =
        scaled_potentials(p, params.potentials + index * (all.n + all.m), all.n + all.m, potentials_);
    if (!(potentials[0] == potentials[0]) || !p.valid) {
      write_nan_gradients(all, p.rows, p.cols, views);
      return true;  // nothing to solve: the problem itself has no solution
    }
    matrix_.attach(&problem_, executor);
    matrix_.absorb(potentials, p.extra_potential(), potentials + all.n);
    Buffer<double>* const over_rows[] = {&rho_, &row_factor_, &grad_f_};
    Buffer<double>* const over_cols[] = {&sigma_, &X_, &x_, &residual_, &direction_, &scaled_, &column_sums_};
    for (Buffer<double>* x : over_rows) x->resize(p.padded_rows);
    for (Buffer<double>* x : over_cols) x->resize(p.padded_cols);
    matrix_.sweep(p.b, sigma_, [&](int64_t i, Four<double> y) {
      store(rho_ + i, y);
      return load<Four<double>>(p.a + i);
    });
    matrix_.mark_empty(rho_, sigma_);
    if (views.cost != nullptr) direct_cost_.resize(p.swept_rows * p.padded_cols);
    bool has_direct_cost = false;
    outputs_.compute(
        p, matrix_, params, views, potentials,
        [&](int64_t i, double* e) {
          const double* row = matrix_.row(i, e);
          if (row != e) std::memcpy(e, row, static_cast<size_t>(p.padded_cols) * sizeof(double));
        },
        [&](int64_t i, const double* dc) {
          if (views.cost == nullptr) return;
          __atomic_store_n(&has_direct_cost, true, __ATOMIC_RELAXED);
          std::memcpy(direct_cost_ + i * p.padded_cols, dc, static_cast<size_t>(p.cols) * sizeof(double));
        });
    // A row or column without an allowed pair has the sum 0 and takes no part.
    for (int64_t i = 0; i < p.swept_rows; ++i) {
      if (!(rho_[i] > 0)) rho_[i] = 1;
      row_factor_[i] = p.a[i] / rho_[i];
    }
    for (int64_t j = 0; j < p.padded_cols; ++j)
      if (!(sigma_[j] > 0)) sigma_[j] = 1;

    if (!solve(params.tol, params.max_iter)) {
      write_nan_gradients(all, p.rows, p.cols, views);
      return false;
    }
    for (int64_t j = 0; j < p.padded_cols; ++j) X_[j] = p.b[j] > 0 ? p.b[j] * x_[j] : outputs_.g[j] / sigma_[j];
    sweep_to_f(true);
    for (int64_t j = 0; j < p.cols; ++j) outputs_.b[j] -= p.eps * column_sums_[j];
    write_weights_gradient(outputs_.a.data(), p.rows, all.n, true, views, views.a);
    write_weights_gradient(outputs_.b.data(), p.cols, all.m, true, views, views.b);
    if (views.cost == nullptr) return true;
    rows_.resize(p.blocks.count * p.padded_cols);
    matrix_.for_blocks([&](int64_t block, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < (end < p.rows ? end : p.rows); ++i) {
        const double *e = matrix_.row(i, rows_ + block * p.padded_cols), *direct = direct_cost_ + i * p.padded_cols;
        Real* out = views.cost + i * all.m;
        for (int64_t j = 0; j < p.cols; ++j) {
          const double through = p.a[i] * (e[j] * X_[j]) + p.b[j] * (e[j] * grad_f_[i]);
          out[j] = views.for_cost(has_direct_cost ? through + direct[j] : through);
        }
        for (int64_t j = p.cols; j < all.m; ++j) out[j] = 0;
      }
    });
    clear_cost_rows(p.rows, all.n, all.m, views.cost);
    return true;
  }

 private:
  static constexpr double singular = 1e-13;

  // grad_f_ = F / rho with F = (f outputs) - a * (E X); column_sums_ = E^T (F / rho). The share of `a` is -eps * (E X).
  void sweep_to_f(bool add_to_a) {
    matrix_.sweep(X_, column_sums_, [&](int64_t i, Four<double> y) {
      const Four<double> F = load<Four<double>>(outputs_.f + i) - load<Four<double>>(problem_.a + i) * y;
      const Four<double> scaled = F / load<Four<double>>(rho_ + i);
      store(grad_f_ + i, scaled);
      if (add_to_a) store(outputs_.a + i, load<Four<double>>(outputs_.a + i) - problem_.eps * y);
      return scaled;
    });
  }

  void apply(const double* x, double* Sx) {
    const Problem<double>& p = problem_;
    for (int64_t j = 0; j < p.padded_cols; ++j) scaled_[j] = p.b[j] * x[j];
    matrix_.sweep(scaled_, column_sums_,
                  [&](int64_t i, Four<double> y) { return load<Four<double>>(row_factor_ + i) * y; });
    for (int64_t j = 0; j < p.padded_cols; ++j) Sx[j] = p.b[j] * (sigma_[j] * x[j] - column_sums_[j]);
  }

  // Conjugate gradients from x = 0. The norm is that of the preconditioner; a residual counts against both parts of h,
  // since for the value alone h is nothing but the rounding of their difference.
  bool solve(double tol, int64_t max_iter) {
    const Problem<double>& p = problem_;
    for (int64_t j = 0; j < p.padded_cols; ++j) X_[j] = p.b[j] > 0 ? 0.0 : outputs_.g[j] / sigma_[j];
    sweep_to_f(false);
    double norm_g = 0, norm_f = 0, mean = 0, weight = 0;
    for (int64_t j = 0; j < p.padded_cols; ++j) {
      x_[j] = 0;
      residual_[j] = 0;
      if (!(p.b[j] > 0)) continue;
      const double through_f = p.b[j] * column_sums_[j], diagonal = p.b[j] * sigma_[j];
      residual_[j] = outputs_.g[j] - through_f;
      norm_g += outputs_.g[j] * outputs_.g[j] / diagonal;
      norm_f += through_f * through_f / diagonal;
      mean += residual_[j];
      weight += diagonal;
    }
    for (int64_t j = 0; j < p.padded_cols; ++j) residual_[j] -= p.b[j] * sigma_[j] * (mean / weight);
    const double bound = tol * tol * (norm_g > norm_f ? norm_g : norm_f);
    double rho = preconditioned_norm();
    for (int64_t j = 0; j < p.padded_cols; ++j) direction_[j] = preconditioned(j);
    for (int64_t step = 0; step < max_iter; ++step) {
      if (rho <= bound) return true;
      apply(direction_, X_);
      double curvature = 0, length_squared = 0;
      for (int64_t j = 0; j < p.padded_cols; ++j) {
        curvature += direction_[j] * X_[j];
        length_squared += direction_[j] * direction_[j] * p.b[j] * sigma_[j];
      }
      // Along a direction in which S is zero to rounding, as between blocks that exchange no mass, nothing can be solved.
      if (!(curvature > singular * length_squared)) return false;
      const double length = rho / curvature;
      for (int64_t j = 0; j < p.padded_cols; ++j) {
        x_[j] += length * direction_[j];
        residual_[j] -= length * X_[j];
      }
      const double next = preconditioned_norm(), ratio = next / rho;
      for (int64_t j = 0; j < p.padded_cols; ++j) direction_[j] = preconditioned(j) + ratio * direction_[j];
      rho = next;
    }
    return rho <= bound;
  }

  double preconditioned(int64_t j) const {
    return problem_.b[j] > 0 ? residual_[j] / (problem_.b[j] * sigma_[j]) : 0.0;
  }
  double preconditioned_norm() const {
    double sum = 0;
    for (int64_t j = 0; j < problem_.padded_cols; ++j) sum += residual_[j] * preconditioned(j);
    return sum;
  }

  Problem<double> problem_;
  Buffer<double> potentials_;
  KernelMatrix<double> matrix_;  // holds E
  OutputGradient<double> outputs_;
  Buffer<double> direct_cost_;                                                  // [swept_rows, padded_cols]
  Buffer<double> rows_;                                                         // [blocks, padded_cols]
  Buffer<double> rho_, row_factor_, grad_f_;                                    // [padded_rows]
  Buffer<double> sigma_, X_, x_, residual_, direction_, scaled_, column_sums_;  // [padded_cols]
};

template <class T>
void implicit_backward(const BackwardParams& params, const Executor& executor) {
  for_each_worker<double>(params.problems, executor, [&](Executor inner, const auto& next) {
    ImplicitGradient<T> gradient;
    for (int64_t index = next(); index >= 0; index = next())
      params.converged[index] = gradient.run(params, index, &inner);
  });
}

}  // namespace
}  // namespace otface::sinkhorn
