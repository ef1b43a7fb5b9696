// The unrolled gradient: the exact derivative of the finitely many iterations that were done.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// Iteration t took g_{t-1} to f_t by the row-stochastic R_ij = b_j exp((f_t,i + g_{t-1},j - C_ij) / eps), and f_t to g_t by
// the column-stochastic Q_ij = a_i exp((f_t,i + g_t,j - C_ij) / eps). With F, G the derivatives of the loss by f_t, g_t:
//
//   F_i = (outputs) - sum_j Q_ij G_j,              G'_j = -sum_i R_ij F_i   (G' belongs to g_{t-1})
//   dC_ij += Q_ij G_j + R_ij F_i,   da_i -= eps * sum_j Q_ij G_j / a_i,   db_j -= eps * sum_i R_ij F_i / b_j
//
// In terms of K: Q_ij = (a_i / r_i) K_ij / s_j and R_ij = (1 / r_i) K_ij b_j / s'_j. So the reverse of an iteration is again
// one sweep (y = K (G / s), w = F / r, then K^T w), and dC is K times a sum of outer products, two per iteration, which is
// computed as a small matrix product over many iterations at once. K changes only where the solve rebuilt it.
//
// Per iteration and problem: 2 n m multiply-adds for the sweep, 2 n m for the outer products.
#pragma once

#include "sinkhorn/cpu_gradient.h"

namespace otface::sinkhorn {
namespace {

// sum_k left[k][i] right[k][j] for the terms collected so far, added up entry by entry times K. Laid out like K.
template <class T>
class OuterProducts {
 public:
  // Where the sum is not wanted, the factors have their place all the same and are forgotten.
  void attach(const Problem<T>* p, const KernelMatrix<T>* matrix, bool wanted) {
    p_ = p;
    matrix_ = matrix;
    wanted_ = wanted;
    left_.resize(most_terms * p->padded_rows);
    right_.resize(most_terms * p->padded_cols);
    const int64_t count = p->swept_rows * matrix->ld(), strip_count = matrix->strips() * p->padded_rows;
    terms_ = 0;
    if (!wanted) return;
    sum_.resize(count);
    strip_sum_.resize(strip_count);
    for (int64_t k = 0; k < count; ++k) sum_[k] = 0;
    for (int64_t k = 0; k < strip_count; ++k) strip_sum_[k] = 0;
  }

  T* left(int ahead = 0) { return left_ + (terms_ + ahead) * p_->padded_rows; }
  T* right(int ahead = 0) { return right_ + (terms_ + ahead) * p_->padded_cols; }
  void push(int terms) {
    if (!wanted_) return;
    terms_ += terms;
    if (terms_ + 2 > most_terms) flush();
  }

  void flush() {
    if (terms_ == 0) return;
    constexpr int W = lanes<T>;
    matrix_->for_blocks([&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += 4) {
        int64_t j = 0;
        for (; j + 4 * W <= matrix_->ld(); j += 4 * W) add_tile<4>(i, j);
        for (; j + 3 * W <= matrix_->ld(); j += 3 * W) add_tile<3>(i, j);
        for (; j < matrix_->ld(); j += W) add_tile<1>(i, j);
        for (int64_t c = 0; c < matrix_->strips(); ++c) add_to_strip(i, c);
      }
    });
    terms_ = 0;
  }

  // Row i of the sum, [padded_cols]: what it starts from (zero else), and, with zeros up to m, what it has come to.
  void start_row(int64_t i, const T* row) {
    if (!wanted_) return;
    std::memcpy(sum_ + i * matrix_->ld(), row, static_cast<size_t>(matrix_->ld()) * sizeof(T));
    for (int64_t c = 0; c < matrix_->strips(); ++c) strip_sum_[c * p_->padded_rows + i] = row[matrix_->ld() + c];
  }
  void write_row(int64_t i, int64_t m, T* out) const {
    const int64_t ld = matrix_->ld(), strips = matrix_->strips(), in_main = p_->cols - strips;
    std::memcpy(out, sum_ + i * ld, static_cast<size_t>(in_main) * sizeof(T));
    for (int64_t c = 0; c < strips; ++c) out[in_main + c] = strip_sum_[c * p_->padded_rows + i];
    for (int64_t j = p_->cols; j < m; ++j) out[j] = 0;
  }

 private:
  static constexpr int most_terms = 32;

  template <int Width>
  OTFACE_INLINE void add_tile(int64_t i, int64_t j) {
    using V = Vec<T>;
    constexpr int W = lanes<T>;
    V tile[4][Width] = {};
    const int64_t terms = terms_, height = p_->padded_rows, width = p_->padded_cols;
    const T *l = left_ + i, *r = right_ + j;
    for (int64_t k = 0; k < terms; ++k, l += height, r += width) {
      for (int v = 0; v < Width; ++v) {
        const V r_v = load<V>(r + v * W);
        for (int q = 0; q < 4; ++q) tile[q][v] += r_v * l[q];
      }
    }
    for (int q = 0; q < 4; ++q) {
      const int64_t at = (i + q) * matrix_->ld() + j;
      for (int v = 0; v < Width; ++v) {
        T* out = sum_ + at + v * W;
        store(out, load<V>(out) + tile[q][v] * load<V>(matrix_->main() + at + v * W));
      }
    }
  }

  void add_to_strip(int64_t i, int64_t c) {
    Four<T> tile{};
    for (int64_t k = 0; k < terms_; ++k)
      tile += load<Four<T>>(left_ + k * p_->padded_rows + i) * right_[k * p_->padded_cols + matrix_->ld() + c];
    T* out = strip_sum_ + c * p_->padded_rows + i;
    store(out, load<Four<T>>(out) + tile * load<Four<T>>(matrix_->strip(c) + i));
  }

  const Problem<T>* p_ = nullptr;
  const KernelMatrix<T>* matrix_ = nullptr;
  Buffer<T> left_, right_;  // [most_terms, padded_rows], [most_terms, padded_cols]
  Buffer<T> sum_, strip_sum_;
  bool wanted_ = false;
  int64_t terms_ = 0;
};

template <class T>
class UnrolledGradient {
 public:
  void run(const BackwardParams& params, int64_t index, const Executor* executor) {
    const Problems& all = params.problems;
    problem_.read(all, index);
    const Problem<T>& p = problem_;
    const GradientViews<T> views(params, p);
    const double* potentials =
        scaled_potentials(p, params.potentials + index * (all.n + all.m), all.n + all.m, potentials_);
    if (!(potentials[0] == potentials[0]) || !p.valid || params.n_iter[index] < 1) {
      write_nan_gradients(all, p.rows, p.cols, views);
      return;
    }
    params_ = &params;
    wants_a_ = views.a != nullptr;
    wants_b_ = views.b != nullptr;
    f_is_zero_ = false;
    matrix_.attach(&problem_, executor);
    products_.attach(&problem_, &matrix_, views.cost != nullptr);
    for (Buffer<T>& r : r_) fill(r, p.padded_rows, T(1));
    for (Buffer<T>& s : s_) fill(s, p.padded_cols, T(1));
    fill(grad_f_, p.padded_rows, T(0));
    fill(row_share_, p.padded_rows, T(0));
    fill(grad_g_, p.padded_cols, T(0));
    fill(column_sums_, p.padded_cols, T(0));
    fill(ones_, p.padded_cols, T(1));
    start_g_.resize(p.padded_cols);

    const int64_t last = params.n_iter[index];
    for (int64_t end = last; end >= 1;) {
      int64_t begin = end;
      while (rebuilt(begin) == 0) --begin;
      reverse_stretch(begin, end, end == last, views, potentials);
      end = begin - 1;
    }

    write_weights_gradient(outputs_.a.data(), p.rows, all.n, false, views, views.a);
    write_weights_gradient(outputs_.b.data(), p.cols, all.m, false, views, views.b);
    if (views.cost != nullptr) {
      matrix_.for_blocks([&](int64_t, int64_t first, int64_t past) {
        for (int64_t i = first; i < (past < p.rows ? past : p.rows); ++i) {
          products_.write_row(i, all.m, views.cost + i * all.m);
          views.finish_cost_row(views.cost + i * all.m, p.cols);
        }
      });
      clear_cost_rows(p.rows, all.n, all.m, views.cost);
    }
  }

 private:
  static void fill(Buffer<T>& buffer, int64_t count, T value) {
    T* x = buffer.resize(count);
    for (int64_t k = 0; k < count; ++k) x[k] = value;
  }

  const T* slot(int64_t iteration) const {
    const HistoryView& h = params_->history;
    return static_cast<const T*>(h.slots) + (problem_.index * h.max_iter + iteration - 1) * h.slot;
  }
  uint8_t rebuilt(int64_t iteration) const {
    return params_->history.rebuilt[problem_.index * params_->history.max_iter + iteration - 1];
  }
  void load_sums(int64_t iteration, T* r, T* s) const {
    const T* in = slot(iteration);
    // The history is read backwards, which the processor does not foresee. (A prefetch past its start does no harm.)
    const char* ahead = reinterpret_cast<const char*>(in - 4 * params_->history.slot);
    const int64_t bytes = params_->history.slot * static_cast<int64_t>(sizeof(T));
    for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(ahead + k);
    std::memcpy(s, in, static_cast<size_t>(problem_.cols) * sizeof(T));
    std::memcpy(r, in + params_->problems.m, static_cast<size_t>(problem_.rows) * sizeof(T));
  }

  // Iterations begin..end, which share one K: begin is where it was rebuilt.
  void reverse_stretch(int64_t begin, int64_t end, bool is_last, const GradientViews<T>& views,
                       const double* potentials) {
    const Problem<T>& p = problem_;
    const T* start = slot(begin);
    for (int64_t j = 0; j < p.padded_cols; ++j)
      start_g_[j] =
          j < p.cols ? static_cast<double>(start[j]) + static_cast<double>(start[params_->problems.m + j]) : 0.0;
    bool columns_too;
    // r_[0], s_[0]: iteration `begin`; the two other pairs alternate between an iteration and the one before it.
    matrix_.build(start_g_, r_[0], s_[0], columns_too);
    int now = begin == end ? 0 : 1;
    if (now != 0) load_sums(end, r_[now], s_[now]);
    if (is_last) start_from_outputs(views, potentials, r_[now], s_[now]);
    for (int64_t t = end; t > begin; --t) {
      const int before = t - 1 == begin ? 0 : 3 - now;
      if (before != 0) load_sums(t - 1, r_[before], s_[before]);
      reverse_iteration(r_[now], s_[now], s_[before]);
      now = before;
    }
    if (columns_too) {
      reverse_apart(r_[0], s_[0]);
    } else {
      reverse_iteration(r_[0], s_[0], ones_);  // K was built from g itself, whose scaling is 1
    }
    products_.flush();
  }

  void start_from_outputs(const GradientViews<T>& views, const double* potentials, const T* r, const T* s) {
    const Problem<T>& p = problem_;
    T* inverse_s = products_.right(0);  // nothing else is there yet
    for (int64_t j = 0; j < p.padded_cols; ++j) inverse_s[j] = T(1) / s[j];
    outputs_.compute(
        p, matrix_, *params_, views, potentials,
        [&](int64_t i, T* e) {
          const T* k = matrix_.row(i, e);
          const T inverse_r = T(1) / r[i], most = std::numeric_limits<T>::max();
          for (int64_t j = 0; j < p.padded_cols; ++j) {
            const T x = k[j] * (inverse_r * inverse_s[j]);
            e[j] = x > most ? most : x;  // between two zero weights it may be beyond all bounds
          }
        },
        [&](int64_t i, const T* dc) { products_.start_row(i, dc); });
    for (int64_t i = 0; i < p.rows; ++i) grad_f_[i] = static_cast<T>(outputs_.f[i]);
    for (int64_t j = 0; j < p.cols; ++j) grad_g_[j] = static_cast<T>(outputs_.g[j]);
  }

  // The columns half of an iteration: x = G / s, then one sweep gives F and K^T (F / r). The outer product is (a / r) x^T.
  // x and the weights F / r are written where the outer products expect them. Where a row or column has no weight, the
  // sweep may give infinity, which counts only in the gradient of that weight.
  void reverse_columns(const T* r, const T* s) {
    using V = Vec<T>;
    const Problem<T>& p = problem_;
    T *x = products_.right(0), *row_weights = products_.left(0), *F_over_r = products_.left(1);
    for (int64_t j = 0; j < p.padded_cols; j += lanes<T>) store(x + j, load<V>(grad_g_ + j) / load<V>(s + j));
    for (int64_t i = 0; i < p.padded_rows; i += lanes<T>) store(row_weights + i, load<V>(p.a + i) / load<V>(r + i));
    const T* grad_f = grad_f_;
    T* row_share = row_share_;
    matrix_.sweep(x, column_sums_, [=](int64_t i, Four<T> y) {
      const Four<T> r_i = load<Four<T>>(r + i);
      const Four<T> weight = load<Four<T>>(row_weights + i), share = weight > Four<T>{} ? weight * y : Four<T>{};
      const Four<T> w = (load<Four<T>>(grad_f + i) - share) / r_i;
      store(row_share + i, y);
      store(F_over_r + i, w);
      return w;
    });
    if (wants_a_)
      for (int64_t i = 0; i < p.rows; ++i)
        outputs_.a[i] -= p.eps * (static_cast<double>(row_share_[i]) / static_cast<double>(r[i]));
  }

  // The rows half: G of the iteration before, with column sums s_before and x_before = b / s_before. The outer product is
  // (F / r) x_before^T.
  void reverse_rows(const T* x_before, const T* s_before) {
    using V = Vec<T>;
    const Problem<T>& p = problem_;
    for (int64_t j = 0; j < p.padded_cols; j += lanes<T>) {
      const V x = load<V>(x_before + j);
      store(grad_g_ + j, x > V{} ? -x * load<V>(column_sums_ + j) : V{});
    }
    if (wants_b_)
      for (int64_t j = 0; j < p.cols; ++j)
        outputs_.b[j] -= p.eps * (static_cast<double>(column_sums_[j]) / static_cast<double>(s_before[j]));
    if (!f_is_zero_) fill(grad_f_, p.padded_rows, T(0));
    f_is_zero_ = true;  // f reaches the outputs through the last iteration only
  }

  // Both halves of an iteration with the sums r, s; s_before are the column sums it started from.
  void reverse_iteration(const T* r, const T* s, const T* s_before) {
    using V = Vec<T>;
    reverse_columns(r, s);
    T* x_before = products_.right(1);
    for (int64_t j = 0; j < problem_.padded_cols; j += lanes<T>)
      store(x_before + j, load<V>(problem_.b + j) / load<V>(s_before + j));
    reverse_rows(x_before, s_before);
    products_.push(2);
  }

  // The rebuild normalised the columns as well, so that the two halves of this iteration belong to two matrices.
  void reverse_apart(T* r, T* s) {
    const Problem<T>& p = problem_;
    reverse_columns(r, s);
    fill(F_, p.padded_rows, T(0));
    for (int64_t i = 0; i < p.rows; ++i) F_[i] = products_.left(1)[i] * r[i];
    products_.push(1);
    products_.flush();
    matrix_.build_rows(start_g_, r, s);
    T *F_over_r = products_.left(0), *x_before = products_.right(0);
    for (int64_t i = 0; i < p.padded_rows; ++i) F_over_r[i] = F_[i] / r[i];
    for (int64_t j = 0; j < p.padded_cols; ++j) x_before[j] = p.b[j];
    matrix_.sweep(x_before, column_sums_, [=](int64_t i, Four<T>) { return load<Four<T>>(F_over_r + i); });
    reverse_rows(x_before, ones_);
    products_.push(1);
  }

  const BackwardParams* params_ = nullptr;
  bool wants_a_ = false, wants_b_ = false, f_is_zero_ = false;
  Problem<T> problem_;
  Buffer<double> potentials_;
  KernelMatrix<T> matrix_;
  OuterProducts<T> products_;
  OutputGradient<T> outputs_;
  Buffer<T> r_[3], s_[3];
  Buffer<T> grad_f_, F_, row_share_;       // [padded_rows]
  Buffer<T> grad_g_, column_sums_, ones_;  // [padded_cols]
  Buffer<double> start_g_;
};

template <class T>
void unrolled_backward(const BackwardParams& params, const Executor& executor) {
  for_each_worker<T>(params.problems, executor, [&](Executor inner, const auto& next) {
    UnrolledGradient<T> gradient;
    for (int64_t index = next(); index >= 0; index = next()) gradient.run(params, index, &inner);
  });
}

}  // namespace
}  // namespace otface::sinkhorn
