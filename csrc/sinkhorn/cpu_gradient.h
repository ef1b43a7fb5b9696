// What the three gradients share: where results go, and the derivative of the outputs with respect to the last potentials.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
#pragma once

#include "sinkhorn/cpu_kernel_matrix.h"

namespace otface::sinkhorn {
namespace {

// The incoming gradients of one problem, and its outgoing ones. Null where nothing was asked for.
template <class T>
struct GradientViews {
  double value = 0, transport_cost = 0;
  const T *f = nullptr, *g = nullptr, *plan = nullptr;  // [n], [m], [n, m]
  T *cost = nullptr, *a = nullptr, *b = nullptr;        // [n, m], [n], [m]

  GradientViews(const BackwardParams& params, int64_t index) {
    const int64_t n = params.problems.n, m = params.problems.m;
    const auto at = [&](const void* p, int64_t count) {
      return p == nullptr ? nullptr : static_cast<const T*>(p) + index * count;
    };
    const auto out = [&](void* p, int64_t count) { return p == nullptr ? nullptr : static_cast<T*>(p) + index * count; };
    if (params.grad_value != nullptr) value = static_cast<double>(*at(params.grad_value, 1));
    if (params.grad_transport_cost != nullptr) transport_cost = static_cast<double>(*at(params.grad_transport_cost, 1));
    f = at(params.grad_f, n);
    g = at(params.grad_g, m);
    plan = at(params.grad_plan, n * m);
    cost = out(params.grad_cost, n * m);
    a = out(params.grad_a, n);
    b = out(params.grad_b, m);
  }
};

// Gradients of a problem without a solution: NaN for its valid entries, zero in the padding.
template <class T>
void write_nan_gradients(const Problems& all, int64_t rows, int64_t cols, const GradientViews<T>& out) {
  const T bad = static_cast<T>(nan);
  if (out.a != nullptr)
    for (int64_t i = 0; i < all.n; ++i) out.a[i] = i < rows ? bad : T(0);
  if (out.b != nullptr)
    for (int64_t j = 0; j < all.m; ++j) out.b[j] = j < cols ? bad : T(0);
  if (out.cost == nullptr) return;
  for (int64_t i = 0; i < all.n; ++i)
    for (int64_t j = 0; j < all.m; ++j) out.cost[i * all.m + j] = i < rows && j < cols ? bad : T(0);
}

// Weights are compared along directions that keep the masses equal, so a constant may be added to their gradient: its mean
// over the valid entries is taken away where `centred`.
template <class T>
void write_weights_gradient(const double* grad, int64_t count, int64_t size, bool centred, T* out) {
  if (out == nullptr) return;
  double mean = 0;
  if (centred) {
    for (int64_t i = 0; i < count; ++i) mean += grad[i];
    mean /= static_cast<double>(count);
  }
  for (int64_t i = 0; i < size; ++i) out[i] = i < count ? static_cast<T>(grad[i] - mean) : T(0);
}

// A row of a gradient in the cost goes out without its padding.
template <class T>
void write_cost_row(const T* row, int64_t cols, int64_t m, T* out) {
  std::memcpy(out, row, static_cast<size_t>(cols) * sizeof(T));
  for (int64_t j = cols; j < m; ++j) out[j] = 0;
}

template <class T>
void clear_cost_rows(int64_t begin, int64_t end, int64_t m, T* out) {
  for (int64_t k = begin * m; k < end * m; ++k) out[k] = 0;
}

// The derivative of the outputs with respect to the potentials f, g of the last iterate (before the shift), and directly
// with respect to C, a and b. With E_ij = exp((f_i + g_j - C_ij) / eps), P_ij = a_i b_j E_ij and p_ij the derivative of the
// loss by P_ij (through the plan and through <P, C>):
//
//   df_i = sum_j P_ij p_ij / eps + ...,   dC_ij = -P_ij p_ij / eps + (d transport_cost) P_ij,   da_i = sum_j b_j E_ij p_ij
//
// and f' = f + shift, g' = g - shift with shift = (<b, g> - <a, f>) / (W_a + W_b) leads back to f, g, a, b.
template <class T>
struct OutputGradient {
  Buffer<double> f, g, a, b;  // [padded_rows] or [padded_cols], zero in the padding
  Buffer<double> partial_g, partial_b;
  Buffer<T> row;

  // E(i) gives row i of E as [padded_cols] values; `add_to_cost` is called with (i, row) when the plan is involved.
  template <class Real, class ERow, class AddToCost>
  void compute(const Problem<T>& p, const KernelMatrix<T>& matrix, const BackwardParams& params, const GradientViews<Real>& in,
               const double* potentials, const ERow& e_row, const AddToCost& add_to_cost) {
    const Problems& all = params.problems;
    double* f_ = zero(f, p.padded_rows);
    double* g_ = zero(g, p.padded_cols);
    double* a_ = zero(a, p.padded_rows);
    double* b_ = zero(b, p.padded_cols);
    double shift = 0;
    for (int64_t i = 0; i < p.rows; ++i) {
      if (matrix.empty_row()[i] > 0) continue;
      f_[i] = in.value * static_cast<double>(p.a[i]) + (in.f == nullptr ? 0.0 : static_cast<double>(in.f[i]));
      a_[i] = in.value * potentials[i];
      shift += f_[i];
    }
    for (int64_t j = 0; j < p.cols; ++j) {
      if (matrix.empty_col()[j] > 0) continue;
      g_[j] = in.value * static_cast<double>(p.b[j]) + (in.g == nullptr ? 0.0 : static_cast<double>(in.g[j]));
      b_[j] = in.value * potentials[all.n + j];
      shift -= g_[j];
    }
    shift /= p.mass_a + p.mass_b;
    for (int64_t i = 0; i < p.rows; ++i) {
      f_[i] -= shift * static_cast<double>(p.a[i]);
      a_[i] -= shift * potentials[i];
    }
    for (int64_t j = 0; j < p.cols; ++j) {
      g_[j] += shift * static_cast<double>(p.b[j]);
      b_[j] += shift * potentials[all.n + j];
    }
    if (in.plan == nullptr && in.transport_cost == 0) return;

    const double inverse_eps = p.inverse_eps();
    double* parts_g = zero(partial_g, p.blocks.count * p.padded_cols);
    double* parts_b = zero(partial_b, p.blocks.count * p.padded_cols);
    row.resize(3 * p.blocks.count * p.padded_cols);
    matrix.for_blocks([&](int64_t block, int64_t begin, int64_t end) {
      T* c = row + 3 * block * p.padded_cols;
      T *e = c + p.padded_cols, *dc = e + p.padded_cols;
      double *block_g = parts_g + block * p.padded_cols, *block_b = parts_b + block * p.padded_cols;
      for (int64_t i = begin; i < (end < p.rows ? end : p.rows); ++i) {
        p.cost.read(i, c);
        e_row(i, e);
        const double a_i = static_cast<double>(p.a[i]);
        double sum_f = 0, sum_a = 0;
        for (int64_t j = 0; j < p.cols; ++j) {
          const double c_ij = static_cast<double>(c[j]);
          dc[j] = 0;
          if (!(c_ij < infinity)) continue;
          const double e_ij = static_cast<double>(e[j]), b_j = static_cast<double>(p.b[j]);
          const double by_plan =
              in.transport_cost * c_ij + (in.plan == nullptr ? 0.0 : static_cast<double>(in.plan[i * all.m + j]));
          const double plan_ij = a_i * b_j * e_ij;
          const double by_exponent = plan_ij * by_plan * inverse_eps;
          sum_f += by_exponent;
          block_g[j] += by_exponent;
          sum_a += b_j * e_ij * by_plan;
          block_b[j] += a_i * e_ij * by_plan;
          dc[j] = static_cast<T>(in.transport_cost * plan_ij - by_exponent);
        }
        f_[i] += sum_f;
        a_[i] += sum_a;
        add_to_cost(i, dc);
      }
    });
    for (int64_t block = 0; block < p.blocks.count; ++block) {
      for (int64_t j = 0; j < p.cols; ++j) {
        g_[j] += parts_g[block * p.padded_cols + j];
        b_[j] += parts_b[block * p.padded_cols + j];
      }
    }
  }

 private:
  static double* zero(Buffer<double>& buffer, int64_t count) {
    double* x = buffer.resize(count);
    for (int64_t k = 0; k < count; ++k) x[k] = 0;
    return x;
  }
};

}  // namespace
}  // namespace otface::sinkhorn
