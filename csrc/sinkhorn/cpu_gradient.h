// What the three gradients share: where results go, and the derivative of the outputs with respect to the last potentials.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
#pragma once

#include "sinkhorn/cpu_kernel_matrix.h"

namespace otface::sinkhorn {
namespace {

// The incoming gradients of one problem, and its outgoing ones. Null where nothing was asked for. The incoming ones are those
// of the problem at hand, which is scaled by powers of two where eps or a mass is extreme (cpu_problem.h).
template <class T>
struct GradientViews {
  double value = 0, transport_cost = 0;
  T *cost = nullptr, *a = nullptr, *b = nullptr;  // [n, m], [n], [m]

  template <class U>
  GradientViews(const BackwardParams& params, const Problem<U>& p)
      : cost_exponent_(p.cost_exponent), mass_exponent_(p.mass_exponent) {
    // The loss is multiplied by a power of two as well, so that what comes in stays about what it is: derivatives by value and
    // transport cost, and by the plan of an extreme mass. With an extreme mass, those by potentials are left as they are.
    const bool by_potentials = params.grad_f != nullptr || params.grad_g != nullptr;
    loss_exponent_ = cost_exponent_ + (by_potentials ? 0 : mass_exponent_);
    const int64_t index = p.index;
    const int64_t n = params.problems.n, m = params.problems.m;
    const auto at = [&](const void* p, int64_t count) {
      return p == nullptr ? nullptr : static_cast<const T*>(p) + index * count;
    };
    const auto out = [&](void* p, int64_t count) {
      return p == nullptr ? nullptr : static_cast<T*>(p) + index * count;
    };
    const int exponent = loss_exponent_ - cost_exponent_ - mass_exponent_;
    if (params.grad_value != nullptr) value = times_power(static_cast<double>(*at(params.grad_value, 1)), exponent);
    if (params.grad_transport_cost != nullptr)
      transport_cost = times_power(static_cast<double>(*at(params.grad_transport_cost, 1)), exponent);
    f_ = at(params.grad_f, n);
    g_ = at(params.grad_g, m);
    plan_ = at(params.grad_plan, n * m);
    cost = out(params.grad_cost, n * m);
    a = out(params.grad_a, n);
    b = out(params.grad_b, m);
  }

  double f(int64_t i) const { return of_potential(f_, i); }
  double g(int64_t j) const { return of_potential(g_, j); }
  bool has_plan() const { return plan_ != nullptr; }
  double plan(int64_t entry) const {
    return times_power(static_cast<double>(plan_[entry]), loss_exponent_ - mass_exponent_);
  }

  // Outgoing gradients, as those of the problem that was given.
  T for_cost(double x) const { return static_cast<T>(times_power(x, cost_exponent_ - loss_exponent_)); }
  T for_weight(double x) const { return static_cast<T>(times_power(x, mass_exponent_ - loss_exponent_)); }
  void finish_cost_row(T* row, int64_t cols) const {
    if (cost_exponent_ == loss_exponent_) return;
    for (int64_t j = 0; j < cols; ++j) row[j] = for_cost(static_cast<double>(row[j]));
  }

 private:
  double of_potential(const T* grad, int64_t k) const {
    return grad == nullptr ? 0.0 : times_power(static_cast<double>(grad[k]), loss_exponent_ - cost_exponent_);
  }

  const T *f_ = nullptr, *g_ = nullptr, *plan_ = nullptr;  // [n], [m], [n, m]
  int cost_exponent_, mass_exponent_, loss_exponent_ = 0;
};

// The potentials [n + m] of the problem at hand; f + g is still that of the problem that was given.
template <class T>
const double* scaled_potentials(const Problem<T>& p, const double* potentials, int64_t count, Buffer<double>& buffer) {
  if (p.cost_exponent == 0) return potentials;
  buffer.resize(count);
  for (int64_t k = 0; k < count; ++k) buffer[k] = times_power(potentials[k], p.cost_exponent);
  return buffer;
}

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
void write_weights_gradient(const double* grad, int64_t count, int64_t size, bool centred,
                            const GradientViews<T>& views, T* out) {
  if (out == nullptr) return;
  double mean = 0;
  if (centred) {
    for (int64_t i = 0; i < count; ++i) mean += grad[i];
    mean /= static_cast<double>(count);
  }
  for (int64_t i = 0; i < size; ++i) out[i] = i < count ? views.for_weight(grad[i] - mean) : T(0);
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
      f_[i] = in.value * static_cast<double>(p.a[i]) + in.f(i);
      a_[i] = in.value * potentials[i];
      shift += f_[i];
    }
    for (int64_t j = 0; j < p.cols; ++j) {
      if (matrix.empty_col()[j] > 0) continue;
      g_[j] = in.value * static_cast<double>(p.b[j]) + in.g(j);
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
    if (!in.has_plan() && in.transport_cost == 0) return;

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
        if (in.has_plan())
          for (int64_t j = 0; j < p.cols; ++j) by_plan[j] = static_cast<T>(in.plan(i * all.m + j));
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
