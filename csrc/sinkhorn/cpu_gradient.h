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
    const auto out = [&](void* p, int64_t count) {
      return p == nullptr ? nullptr : static_cast<T*>(p) + index * count;
    };
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
  Buffer<double> f, g, a, b;       // [padded_rows] or [padded_cols], zero in the padding
  Buffer<T> partial_g, partial_b;  // [blocks, padded_cols]
  Buffer<T> row;                   // [blocks, 4, padded_cols]

  // E(i) gives row i of E as [padded_cols] values; `add_to_cost` is called with (i, row) when the plan is involved.
  template <class Real, class ERow, class AddToCost>
  void compute(const Problem<T>& p, const KernelMatrix<T>& matrix, const BackwardParams& params,
               const GradientViews<Real>& in, const double* potentials, const ERow& e_row,
               const AddToCost& add_to_cost) {
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

    using V = Vec<T>;
    const int64_t count = p.padded_cols;
    const T inverse_eps = static_cast<T>(p.inverse_eps()), transport_cost = static_cast<T>(in.transport_cost);
    partial_g.resize(p.blocks.count * count);
    partial_b.resize(p.blocks.count * count);
    row.resize(4 * p.blocks.count * count);
    matrix.for_blocks([&](int64_t block, int64_t begin, int64_t end) {
      T* c = row + 4 * block * count;
      T *e = c + count, *dc = e + count, *by_plan = dc + count;
      T *block_g = partial_g + block * count, *block_b = partial_b + block * count;
      for (int64_t j = 0; j < count; ++j) block_g[j] = block_b[j] = by_plan[j] = 0;
      for (int64_t i = begin; i < (end < p.rows ? end : p.rows); ++i) {
        p.cost.read(i, c);
        e_row(i, e);
        if (in.plan != nullptr)
          for (int64_t j = 0; j < p.cols; ++j) by_plan[j] = static_cast<T>(in.plan[i * all.m + j]);
        const T a_i = p.a[i];
        V sum_f{}, sum_a{};
        for (int64_t j = 0; j < count; j += lanes<T>) {
          const V c_v = load<V>(c + j), e_v = load<V>(e + j), b_v = load<V>(p.b + j);
          const auto allowed = c_v < std::numeric_limits<T>::infinity();
          const V p_v = allowed ? transport_cost * c_v + load<V>(by_plan + j) : V{};
          const V plan = a_i * (b_v * e_v), by_exponent = plan * p_v * inverse_eps;
          sum_f += by_exponent;
          sum_a += b_v * e_v * p_v;
          store(block_g + j, load<V>(block_g + j) + by_exponent);
          store(block_b + j, load<V>(block_b + j) + a_i * e_v * p_v);
          store(dc + j, transport_cost * plan - by_exponent);
        }
        f_[i] += static_cast<double>(sum_lanes(sum_f));
        a_[i] += static_cast<double>(sum_lanes(sum_a));
        add_to_cost(i, dc);
      }
    });
    for (int64_t block = 0; block < p.blocks.count; ++block) {
      for (int64_t j = 0; j < p.cols; ++j) {
        g_[j] += static_cast<double>(partial_g[block * count + j]);
        b_[j] += static_cast<double>(partial_b[block * count + j]);
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
