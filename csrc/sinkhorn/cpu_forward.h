// The solve. Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// One problem stays with one thread (or, when it is large, with all of them) until it is done; K stays in L1 or L2.
// Per iteration and problem: 2 n m multiply-adds, one read of K (4 n m bytes in float).
#pragma once

#include "sinkhorn/cpu_kernel_matrix.h"

namespace otface::sinkhorn {
namespace {

template <class T>
class ForwardSolver {
 public:
  // Reads the problem and does its first iteration. Writes the results at once, and returns false, if that cannot be done.
  bool start(const ForwardParams& params, int64_t index, const Executor* executor) {
    params_ = &params;
    problem_.read(params.problems, index);
    const Problem<T>& p = problem_;
    matrix_.attach(&problem_, executor);
    for (Buffer<T>& r : r_) fill(r.resize(p.padded_rows), p.padded_rows, T(1));
    for (Buffer<T>& s : s_) fill(s.resize(p.padded_cols), p.padded_cols, T(1));
    x_.resize(p.padded_cols);
    start_g_.resize(p.padded_cols);
    tol_ = params.tol[index * params.tol_stride];
    current_ = 0;
    iteration_ = 1;
    is_measured_ = false;
    const T* init = static_cast<const T*>(params.init_g);
    bool finite = true;
    for (int64_t j = 0; j < p.padded_cols; ++j) {
      start_g_[j] = init != nullptr && j < p.cols ? static_cast<double>(init[index * params.problems.m + j]) : 0.0;
      start_g_[j] = times_power(start_g_[j], p.cost_exponent);
      finite = finite && start_g_[j] > -infinity && start_g_[j] < infinity;
    }
    if (!p.valid || !finite || !build(0)) {
      write_failure();
      return false;
    }
    return true;
  }

  // One more iteration; false when the problem was done already.
  bool step() {
    const Problem<T>& p = problem_;
    if (iteration_ >= params_->max_iter) return false;
    const int last = current_, next = 1 - current_;
    T *r = r_[next], *s = s_[next];
    scale_columns(s_[last]);
    matrix_.sweep(x_, s, [&](int64_t i, Four<T> y) {
      const Four<T> sums = y + load<Four<T>>(matrix_.empty_row() + i);
      store(r + i, sums);
      return load<Four<T>>(p.a + i) / sums;
    });
    matrix_.finish_sums(r, s);
    // The row sums of this sweep tell how far the plan of the last iteration was from its row marginals. They are rounded in
    // another way than what is reported, and only what is reported may end the solve.
    const bool looks = tol_ > 0 && iteration_ % params_->check_every == 0;
    if (looks && row_violation(r_[last], r) <= tol_) {
      is_measured_ = write_plan_and_sums() <= tol_;
      if (is_measured_) return false;
    }
    ++iteration_;
    if (all_within(r, p.padded_rows, Band<T>::low, Band<T>::high) &&
        all_within(s, p.padded_cols, Band<T>::low, Band<T>::high)) {
      current_ = next;
      record();
      return true;
    }
    subtract_eps_log(matrix_.g0(), p.eps, s_[last].data(), p.padded_cols, start_g_.data());
    current_ = next;
    if (build(next)) return true;
    iteration_ = 0;  // no solution
    return false;
  }

  void finish() {
    if (iteration_ == 0) {
      write_failure();
      return;
    }
    if (!is_measured_) write_plan_and_sums();
    write_potentials();
  }

 private:
  static void fill(T* x, int64_t count, T value) {
    for (int64_t k = 0; k < count; ++k) x[k] = value;
  }

  // x = b / s, the scaled columns that the next sweep multiplies with.
  void scale_columns(const T* s) {
    for (int64_t j = 0; j < problem_.padded_cols; j += lanes<T>)
      store(x_ + j, load<Vec<T>>(problem_.b + j) / load<Vec<T>>(s + j));
  }

  // K anew from start_g_, which is first rounded to what the history can hold: the gradient then sees the same bits.
  bool build(int into) {
    const Problem<T>& p = problem_;
    T* slot = history_slot();
    for (int64_t j = 0; j < p.padded_cols; ++j) {
      const T high = static_cast<T>(start_g_[j]);
      const T low = static_cast<T>(start_g_[j] - static_cast<double>(high));
      start_g_[j] = static_cast<double>(high) + static_cast<double>(low);
      if (slot != nullptr && j < p.cols) slot[j] = high, slot[params_->problems.m + j] = low;
    }
    if (slot != nullptr) rebuilt() = 1;
    bool columns_too;
    return matrix_.build(start_g_, r_[into], s_[into], columns_too);
  }

  void record() {
    T* slot = history_slot();
    if (slot == nullptr) return;
    std::memcpy(slot, s_[current_].data(), static_cast<size_t>(problem_.cols) * sizeof(T));
    std::memcpy(slot + params_->problems.m, r_[current_].data(), static_cast<size_t>(problem_.rows) * sizeof(T));
    rebuilt() = 0;
  }

  T* history_slot() const {
    const HistoryView& h = params_->history;
    if (h.slots == nullptr) return nullptr;
    return static_cast<T*>(h.slots) + (problem_.index * h.max_iter + iteration_ - 1) * h.slot;
  }
  uint8_t& rebuilt() const {
    return params_->history.rebuilt[problem_.index * params_->history.max_iter + iteration_ - 1];
  }

  // || P 1 - a ||_1 / W of the iterate with row sums `own`, when `next` are the row sums after its column update.
  double row_violation(const T* own, const T* next) const {
    double sum = 0;
    for (int64_t i = 0; i < problem_.rows; ++i) {
      const double ratio = static_cast<double>(next[i]) / static_cast<double>(own[i]);
      sum += static_cast<double>(problem_.a[i]) * __builtin_fabs(ratio - 1);
    }
    return sum / problem_.mass_a;
  }

  // Row i of the plan is (a_i / r_i) K_ij x_j: its sum, its cost, and the row itself where it is asked for. Returns the error.
  double write_plan_and_sums() {
    using V = Vec<T>;
    const Problem<T>& p = problem_;
    const Problems& all = params_->problems;
    scale_columns(s_[current_]);
    const T *r = r_[current_], *x = x_;
    T* plan = static_cast<T*>(params_->plan);
    if (plan != nullptr) plan += p.index * all.n * all.m;
    const int64_t count = p.padded_cols;
    const int64_t ld = matrix_.ld(), strips = matrix_.strips();
    block_sums_.resize(2 * p.blocks.count);
    rows_.resize(p.blocks.count * 4 * count);
    const V largest = broadcast<V>(std::numeric_limits<T>::max());
    matrix_.for_blocks([&](int64_t block, int64_t begin, int64_t end) {
      T* buffer = rows_ + block * 4 * count;
      double violation = 0, cost = 0;
      for (int64_t i = begin; i < end; i += 4) {
        int64_t stride;
        const T* c = p.cost.read_four(i, matrix_.needs_padding(), buffer, stride);
        const T* k = matrix_.main() + i * ld;
        Four<double> mass{}, cost_sum{};
        for (int64_t first = 0; first < ld; first += longest_chain) {
          const int64_t past = first + longest_chain < ld ? first + longest_chain : ld;
          V mass_v[4] = {}, cost_v[4] = {};
          for (int64_t j = first; j < past; j += lanes<T>) {
            const V x_v = load<V>(x + j);
            for (int q = 0; q < 4; ++q) {
              const V entry = load<V>(k + q * ld + j) * x_v;
              mass_v[q] += entry;
              cost_v[q] += entry * vmin(load<V>(c + q * stride + j), largest);  // forbidden: 0 times a finite number
            }
          }
          mass += widen<T>(sum_lanes(mass_v[0], mass_v[1], mass_v[2], mass_v[3]));
          cost_sum += widen<T>(sum_lanes(cost_v[0], cost_v[1], cost_v[2], cost_v[3]));
        }
        for (int64_t s = 0; s < strips; ++s) {
          const Four<T> costs = matrix_.column_of_four(c + ld + s, stride);
          const Four<T> entry = load<Four<T>>(matrix_.strip(s) + i) * x[ld + s];
          mass += widen<T>(entry);
          cost_sum += widen<T>(entry * vmin(costs, Four<T>{} + largest[0]));
        }
        const Four<double> a = widen<T>(load<Four<T>>(p.a + i)), scale = a / widen<T>(load<Four<T>>(r + i));
        const Four<double> row_cost = scale * cost_sum;
        for (int q = 0; q < 4; ++q) {
          violation += __builtin_fabs(scale[q] * mass[q] - a[q]);
          cost += row_cost[q];
        }
        if (plan != nullptr)
          for (int64_t q = 0; q < 4 && i + q < p.rows; ++q)
            write_plan_row(i + q, r[i + q], buffer, plan + (i + q) * all.m);
      }
      block_sums_[2 * block] = violation;
      block_sums_[2 * block + 1] = cost;
    });
    double violation = 0, cost = 0;
    for (int64_t block = 0; block < p.blocks.count; ++block) {
      violation += block_sums_[2 * block];
      cost += block_sums_[2 * block + 1];
    }
    if (plan != nullptr) fill(plan + p.rows * all.m, (all.n - p.rows) * all.m, T(0));
    if (!(cost - cost == 0)) cost = transport_cost_of_large();
    const double error = violation / p.mass_a;
    static_cast<T*>(params_->transport_cost)[p.index] =
        static_cast<T>(times_power(cost, -p.cost_exponent - p.mass_exponent));
    static_cast<T*>(params_->error)[p.index] = static_cast<T>(error);
    params_->n_iter[p.index] = iteration_;
    params_->converged[p.index] =
        tol_ > 0 ? error <= tol_ : error * error <= RoundingLevel<T>::value * static_cast<double>(p.rows + p.cols);
    return error;
  }

  // The transport cost where a sum of costs that are not scaled by their row yet is beyond the range of T.
  double transport_cost_of_large() {
    const Problem<T>& p = problem_;
    constexpr double small = Extremes<T>::small_cost;
    double cost = 0;
    for (int64_t i = 0; i < p.rows; ++i) {
      T* c = rows_;
      p.cost.read(i, c);
      const T* k = matrix_.row(i, c + p.padded_cols);
      double sum = 0;
      for (int64_t j = 0; j < p.cols; ++j) {
        const double entry = static_cast<double>(k[j]) * static_cast<double>(x_[j]);
        if (entry > 0) sum += entry * (static_cast<double>(c[j]) * small);
      }
      cost += static_cast<double>(p.a[i]) / static_cast<double>(r_[current_][i]) * sum;
    }
    return cost / small;
  }

  void write_plan_row(int64_t i, T r, T* buffer, T* out) const {
    const Problem<T>& p = problem_;
    const T scale = p.a[i] / r;
    const T* k = matrix_.row(i, buffer);
    for (int64_t j = 0; j < p.cols; ++j) out[j] = k[j] * x_[j] * scale;
    if (p.mass_exponent != 0)
      for (int64_t j = 0; j < p.cols; ++j)
        out[j] = static_cast<T>(times_power(static_cast<double>(out[j]), -p.mass_exponent));
    fill(out + p.cols, params_->problems.m - p.cols, T(0));
  }

  // f and g, shifted so that <a, f> = <b, g>, and the value <a, f> + <b, g>. Without an allowed pair, a potential is 0.
  void write_potentials() {
    const Problem<T>& p = problem_;
    const Problems& all = params_->problems;
    f_.resize(p.padded_rows);
    subtract_eps_log(matrix_.f0(), p.eps, r_[current_].data(), p.padded_rows, f_.data());
    subtract_eps_log(matrix_.g0(), p.eps, s_[current_].data(), p.padded_cols, start_g_.data());
    if (p.mass_exponent != 0)
      for (int64_t i = 0; i < p.rows; ++i) f_[i] += p.extra_potential();
    double af = 0, bg = 0;
    for (int64_t i = 0; i < p.rows; ++i) af += static_cast<double>(p.a[i]) * f_[i];
    for (int64_t j = 0; j < p.cols; ++j) bg += static_cast<double>(p.b[j]) * start_g_[j];
    const double shift = (bg - af) / (p.mass_a + p.mass_b);
    T* f = static_cast<T*>(params_->f) + p.index * all.n;
    T* g = static_cast<T*>(params_->g) + p.index * all.m;
    double* potentials = params_->potentials + p.index * (all.n + all.m);
    for (int64_t i = 0; i < all.n; ++i) {
      potentials[i] = i < p.rows && !(matrix_.empty_row()[i] > 0) ? times_power(f_[i] + shift, -p.cost_exponent) : 0.0;
      f[i] = static_cast<T>(potentials[i]);
    }
    for (int64_t j = 0; j < all.m; ++j) {
      potentials[all.n + j] =
          j < p.cols && !(matrix_.empty_col()[j] > 0) ? times_power(start_g_[j] - shift, -p.cost_exponent) : 0.0;
      g[j] = static_cast<T>(potentials[all.n + j]);
    }
    const double value = af + bg + (p.mass_a - p.mass_b) * shift;
    static_cast<T*>(params_->value)[p.index] = static_cast<T>(times_power(value, -p.cost_exponent - p.mass_exponent));
  }

  // The outputs of a problem without a solution: NaN where a number was asked for, zero in the padding.
  void write_failure() {
    const Problem<T>& p = problem_;
    const Problems& all = params_->problems;
    const T bad = static_cast<T>(nan);
    static_cast<T*>(params_->value)[p.index] = bad;
    static_cast<T*>(params_->transport_cost)[p.index] = bad;
    static_cast<T*>(params_->error)[p.index] = bad;
    params_->n_iter[p.index] = 0;
    params_->converged[p.index] = false;
    T* f = static_cast<T*>(params_->f) + p.index * all.n;
    T* g = static_cast<T*>(params_->g) + p.index * all.m;
    double* potentials = params_->potentials + p.index * (all.n + all.m);
    for (int64_t i = 0; i < all.n; ++i) f[i] = i < p.rows ? bad : T(0), potentials[i] = static_cast<double>(f[i]);
    for (int64_t j = 0; j < all.m; ++j)
      g[j] = j < p.cols ? bad : T(0), potentials[all.n + j] = static_cast<double>(g[j]);
    if (params_->plan == nullptr) return;
    T* plan = static_cast<T*>(params_->plan) + p.index * all.n * all.m;
    for (int64_t i = 0; i < all.n; ++i)
      for (int64_t j = 0; j < all.m; ++j) plan[i * all.m + j] = i < p.rows && j < p.cols ? bad : T(0);
  }

  const ForwardParams* params_ = nullptr;
  Problem<T> problem_;
  KernelMatrix<T> matrix_;
  Buffer<T> r_[2], s_[2];  // row and column sums of the current and of the other iterate
  int current_ = 0;
  int64_t iteration_ = 0;
  double tol_ = 0;
  bool is_measured_ = false;  // plan and sums of the current iterate are written
  Buffer<T> x_;
  Buffer<double> start_g_, f_;
  Buffer<double> block_sums_;
  Buffer<T> rows_;
};

// Sends for the cost of a problem that is soon to be read, if it is small: the processor does not foresee the next matrix.
inline void prefetch_cost(const Problems& problems, int64_t index) {
  const CostView& cost = problems.cost;
  const int64_t size = cost.dtype == DType::float64 ? 8 : cost.dtype == DType::float32 ? 4 : 2;
  const int64_t bytes = problems.n * problems.m * size;
  if (index >= problems.batch || bytes > (1 << 16) || cost.row_stride != problems.m || cost.col_stride != 1) return;
  const char* data = static_cast<const char*>(cost.data) + index * cost.batch_stride * size;
  for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(data + k, 0, 2);
}

template <class T>
void forward(const ForwardParams& params, const Executor& executor) {
  for_each_worker<T>(params.problems, executor, [&](Executor inner, const auto& next) {
    ForwardSolver<T> solver;
    for (int64_t index = next(); index >= 0; index = next()) {
      prefetch_cost(params.problems, index + executor.threads);  // probably the next one of this thread
      if (!solver.start(params, index, &inner)) continue;
      while (solver.step()) continue;
      solver.finish();
    }
  });
}

}  // namespace
}  // namespace otface::sinkhorn
