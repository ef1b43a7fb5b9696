// The matrix K that is kept on chip for a whole solve, how it is (re)built, and the one sweep that an iteration is.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// With base potentials (f0, g0) absorbed,
//
//   K_ij = exp((f0_i + g0_j - C_ij) / eps),   f_i = f0_i - eps * log r_i,   g_j = g0_j - eps * log s_j,
//   P_ij = (a_i / r_i) K_ij (b_j / s_j),
//
// and one iteration of Sinkhorn is r = K (b / s), then s = K^T (a / r): multiply-adds. Row i gives r_i and at once its
// part of s, so K is read once per iteration (`sweep`). Base potentials are doubles, and so are the differences
// f0_i + g0_j - C_ij before they are divided by eps: K is exact to rounding of Real, however small eps is against C.
//
// Layout. K is row-major, in whole vectors. When only a few columns are left over (49 = 3 * 16 + 1), they would cost a whole
// vector in every row; they are kept as strips instead, one contiguous array over the rows each, and take part four rows
// at a time: 2 short multiply-adds a strip where the vector would take 8 long ones.
#pragma once

#include "sinkhorn/band.h"
#include "sinkhorn/cpu_problem.h"

namespace otface::sinkhorn {
namespace {

constexpr double small_sum = 1e-4;  // a freshly built row or column whose sum is below this is scaled to a sum of 1

template <class T>
bool all_within(const T* x, int64_t count, T low, T high) {  // count is a multiple of the lanes; false for NaN
  auto fine = Vec<T>{} == Vec<T>{};
  for (int64_t k = 0; k < count; k += lanes<T>) {
    const Vec<T> v = load<Vec<T>>(x + k);
    fine &= (v >= low) & (v <= high);
  }
  return !any(~fine);
}

// out_j = (f + g_j) - c_j, in double.
template <class T>
void add_potentials(const T* c, double f, const double* g, int64_t count, double* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = (f + g[j]) - static_cast<double>(c[j]);
}

// out_j = exp(difference_j / eps); a difference of -inf gives 0.
template <class T>
void exp_of(const double* difference, double inverse_eps, int64_t count, T* out) {
  const double scale = inverse_eps * log2_of_e;
  for (int64_t j = 0; j < count; ++j) out[j] = static_cast<T>(difference[j] * scale);
  for (int64_t j = 0; j < count; j += lanes<T>) store(out + j, vexp2(load<Vec<T>>(out + j)));
}

inline double least_of(const double* x, const double* skip, int64_t count) {  // count is a multiple of the lanes
  Vec<double> least = load<Vec<double>>(x) + load<Vec<double>>(skip);
  for (int64_t j = lanes<double>; j < count; j += lanes<double>)
    least = vmin(load<Vec<double>>(x + j) + load<Vec<double>>(skip + j), least);
  return least_lane(least);
}

template <class T>
bool has_nan_or_minus_infinity(const T* c, int64_t count) {
  auto fine = Vec<T>{} == Vec<T>{};
  const T minus_infinity = static_cast<T>(-infinity);
  for (int64_t j = 0; j < count; j += lanes<T>) fine &= load<Vec<T>>(c + j) > minus_infinity;
  return any(~fine);
}

// Long rows are summed in stretches of so many columns, so that the rounding of one long chain does not add up.
constexpr int64_t longest_chain = 2048;

// potentials_i = base_i - eps * log sum_i; count is a multiple of the lanes of T.
template <class T>
void subtract_eps_log(const double* base, double eps, const T* sum, int64_t count, double* potentials) {
  for (int64_t i = 0; i < count; i += lanes<double>) {
    double x[lanes<double>];
    for (int k = 0; k < lanes<double>; ++k) x[k] = static_cast<double>(sum[i + k]);
    store(potentials + i, load<Vec<double>>(base + i) - eps * vlog(load<Vec<double>>(x)));
  }
}

// The sweep over rows [begin, end) of K [.., ld], both multiples of 4:  y_i = K_i . x,  w = weigh(i, y) for four rows at
// a time,  s = sum_i w_i K_i.  Rows are read twice while they are in registers (Width > 0, ld = Width vectors) or in L1.
template <class T, int Width, class Weigh>
OTFACE_INLINE void sweep_rows(const T* K, int64_t ld, int64_t begin, int64_t end, const T* x, T* s,
                              const Weigh& weigh) {
  using V = Vec<T>;
  constexpr int W = lanes<T>;
  if constexpr (Width > 0) {
    V x_v[Width], s_v[2][Width];  // two chains of multiply-adds per column: rows 0 and 1, rows 2 and 3
    for (int v = 0; v < Width; ++v) x_v[v] = load<V>(x + v * W), s_v[0][v] = s_v[1][v] = V{};
    for (int64_t i = begin; i < end; i += 4) {
      const T* row = K + i * (Width * W);
      V y[4] = {};
      for (int v = 0; v < Width; ++v)
        for (int q = 0; q < 4; ++q) y[q] += load<V>(row + (q * Width + v) * W) * x_v[v];
      const Four<T> w = weigh(i, sum_lanes(y[0], y[1], y[2], y[3]));
      for (int v = 0; v < Width; ++v)
        for (int q = 0; q < 4; ++q) s_v[q / 2][v] += load<V>(row + (q * Width + v) * W) * w[q];
    }
    for (int v = 0; v < Width; ++v) store(s + v * W, s_v[0][v] + s_v[1][v]);
  } else {
    for (int64_t j = 0; j < ld; j += W) store(s + j, V{});
    for (int64_t i = begin; i < end; i += 4) {
      const T* row = K + i * ld;
      Four<T> total{};
      for (int64_t first = 0; first < ld; first += longest_chain) {
        const int64_t past = first + longest_chain < ld ? first + longest_chain : ld;
        V y[4] = {}, z[4] = {};  // even and odd vectors apart: two chains of multiply-adds per row
        int64_t j = first;
        for (; j + 2 * W <= past; j += 2 * W) {
          const V x0 = load<V>(x + j), x1 = load<V>(x + j + W);
          for (int q = 0; q < 4; ++q) {
            y[q] += load<V>(row + q * ld + j) * x0;
            z[q] += load<V>(row + q * ld + j + W) * x1;
          }
        }
        if (j < past)
          for (int q = 0; q < 4; ++q) y[q] += load<V>(row + q * ld + j) * load<V>(x + j);
        total += sum_lanes(y[0] + z[0], y[1] + z[1], y[2] + z[2], y[3] + z[3]);
      }
      const Four<T> w = weigh(i, total);
      for (int64_t j = 0; j < ld; j += W) {
        V part = load<V>(row + j) * w[0];
        for (int q = 1; q < 4; ++q) part += load<V>(row + q * ld + j) * w[q];
        store(s + j, load<V>(s + j) + part);
      }
    }
  }
}

template <class T>
class KernelMatrix {
 public:
  void attach(const Problem<T>* problem, const Executor* executor) {
    p_ = problem;
    executor_ = executor;
    const int64_t rest = p_->cols % lanes<T>;
    strips_ = p_->cols > lanes<T> && rest <= lanes<T> / 4 ? rest : 0;
    ld_ = strips_ > 0 ? p_->cols - rest : p_->padded_cols;
    K_.resize(p_->swept_rows * ld_);
    strip_.resize(strips_ * p_->padded_rows);
    f0_.resize(p_->padded_rows);
    g0_.resize(p_->padded_cols);
    empty_row_.resize(p_->padded_rows);
    empty_col_.resize(p_->padded_cols);
    partial_.resize(p_->blocks.count * p_->padded_cols);
    difference_.resize(p_->blocks.count * p_->padded_cols);
    rows_.resize(p_->blocks.count * 4 * p_->padded_cols);
    for (int64_t i = 0; i < p_->padded_rows; ++i) empty_row_[i] = i < p_->rows ? T(0) : T(1), f0_[i] = 0;
    for (int64_t j = 0; j < p_->padded_cols; ++j) empty_col_[j] = j < p_->cols ? T(0) : T(1), g0_[j] = 0;
    for (int64_t k = p_->rows * ld_; k < p_->swept_rows * ld_; ++k) K_[k] = 0;
    for (int64_t c = 0; c < strips_; ++c)
      for (int64_t i = p_->rows; i < p_->padded_rows; ++i) strip_[c * p_->padded_rows + i] = 0;
  }

  const T* main() const { return K_; }        // [swept_rows, ld], zero in the padding
  int64_t ld() const { return ld_; }          // columns of the main part, a multiple of the lanes
  int64_t strips() const { return strips_; }  // columns ld .. ld + strips - 1
  const T* strip(int64_t c) const { return strip_ + c * p_->padded_rows; }  // [padded_rows], zero in the padding
  const double* f0() const { return f0_; }                                  // [padded_rows], zero in the padding
  const double* g0() const { return g0_; }                                  // [padded_cols], zero in the padding
  const T* empty_row() const { return empty_row_; }  // [padded_rows], 1 where no pair is allowed (and in the padding)
  const T* empty_col() const {
    return empty_col_;
  }  // [padded_cols]; added to the sums, they make such a sum 1, its log 0

  // Whether rows of the cost have to be padded to whole vectors to go with rows of K.
  bool needs_padding() const { return strips_ == 0 && p_->cols != ld_; }
  static Four<T> column_of_four(const T* c, int64_t stride) {
    return Four<T>{c[0], c[stride], c[2 * stride], c[3 * stride]};
  }

  // Row i in one piece, [padded_cols]: where it lies, or put together in `buffer`.
  const T* row(int64_t i, T* buffer) const {
    if (strips_ == 0) return K_ + i * ld_;
    for (int64_t j = 0; j < ld_; j += lanes<T>) store(buffer + j, load<Vec<T>>(K_ + i * ld_ + j));
    Vec<T> last{};
    for (int64_t c = 0; c < strips_; ++c)
      last = lane_numbers<T>() == static_cast<T>(c) ? broadcast<Vec<T>>(strip(c)[i]) : last;
    store(buffer + ld_, last);
    return buffer;
  }

  // One iteration in the log domain from g, which leaves K, the base potentials and the sums r, s. `columns_too` tells
  // whether the columns had to be normalised as well, so that g0 is not g. False: the cost has a NaN or a -inf, or a row
  // or column of positive weight without an allowed pair, and the problem has no solution.
  bool build(const double* g, T* r, T* s, bool& columns_too) {
    columns_too = false;
    if (!build_rows(g, r, s)) return false;
    if (all_within(s, p_->padded_cols, Band<T>::low, Band<T>::high)) return true;
    columns_too = true;
    return build_columns(r, s);
  }

  // The first half of an iteration: f from g by a row-wise log-sum-exp. g0 = g, and s are the column sums for that f.
  bool build_rows(const double* g, T* r, T* s) {
    const Problem<T>& p = *p_;
    bool ok = true, g_is_zero = true;
    for (int64_t j = 0; j < p.padded_cols; ++j) {
      g0_[j] = g[j];
      g_is_zero = g_is_zero && g[j] == 0;
    }
    const bool plain = g_is_zero && !p.has_zero_in_b;
    for_blocks([&](int64_t block, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += 4) {
        const bool group_ok = plain ? build_four_rows_from_zero(block, i) : build_four_rows(block, i);
        if (!group_ok) __atomic_store_n(&ok, false, __ATOMIC_RELAXED);
      }
    });
    if (!ok) return false;
    sweep(p.b, s, [&](int64_t i, Four<T> y) {
      const Four<T> sums = y + load<Four<T>>(empty_row_ + i);
      store(r + i, sums);
      return load<Four<T>>(p.a + i) / sums;
    });
    finish_sums(r, s);
    // Weights of very different size leave tiny sums, which would be outside the band from the start.
    for (int64_t i = 0; i < p.rows; ++i) {
      if (!(r[i] < static_cast<T>(small_sum))) continue;
      const T scale = T(1) / r[i];
      for (int64_t j = 0; j < ld_; ++j) K_[i * ld_ + j] *= scale;
      for (int64_t c = 0; c < strips_; ++c) strip_[c * p.padded_rows + i] *= scale;
      f0_[i] -= p.eps * __builtin_log(static_cast<double>(r[i]));
      r[i] = 1;
    }
    return all_within(r, p.padded_rows, std::numeric_limits<T>::min(), std::numeric_limits<T>::max());
  }

  // K for the given potentials ([rows], [cols]), f less a constant, whatever their sums may be.
  void absorb(const double* f, double less, const double* g) {
    for (int64_t i = 0; i < p_->rows; ++i) f0_[i] = f[i] - less;
    for (int64_t j = 0; j < p_->cols; ++j) g0_[j] = g[j];
    fill_from_potentials();
  }

  // For K from `absorb`: which rows and columns have no allowed pair, from the sums r = K b and s = K^T a.
  void mark_empty(const T* r, const T* s) {
    for (int64_t i = 0; i < p_->rows; ++i) empty_row_[i] = r[i] > 0 ? T(0) : T(1);
    for (int64_t j = 0; j < p_->cols; ++j) empty_col_[j] = s[j] > 0 ? T(0) : T(1);
  }

  // s = K^T w, where y = K x and w = weigh(i, y_i .. y_i+3) for every fourth i.
  template <class Weigh>
  void sweep(const T* x, T* s, const Weigh& weigh) const {
    if (p_->blocks.count == 1) {
      sweep_block(0, p_->swept_rows, x, s, weigh);
      return;
    }
    for_blocks([&](int64_t block, int64_t begin, int64_t end) {
      sweep_block(begin, end, x, partial_ + block * p_->padded_cols, weigh);
    });
    for (int64_t j = 0; j < p_->padded_cols; j += lanes<T>) {
      Vec<T> sum = load<Vec<T>>(partial_ + j);
      for (int64_t block = 1; block < p_->blocks.count; ++block)
        sum += load<Vec<T>>(partial_ + block * p_->padded_cols + j);
      store(s + j, sum);
    }
  }

  // f(block, first row, last row + 1), possibly on several threads.
  template <class F>
  void for_blocks(const F& f) const {
    run(*executor_, p_->blocks.count,
        [&](int64_t block) { f(block, p_->blocks.begin(block), p_->blocks.end(block, p_->swept_rows)); });
  }

  // The sums of empty columns and of the padding become 1.
  void finish_sums(T* r, T* s) const {
    for (int64_t i = p_->swept_rows; i < p_->padded_rows; ++i) r[i] = 1;
    for (int64_t j = 0; j < p_->padded_cols; j += lanes<T>)
      store(s + j, load<Vec<T>>(s + j) + load<Vec<T>>(empty_col_ + j));
  }

 private:
  template <class Weigh>
  void sweep_block(int64_t begin, int64_t end, const T* x, T* s, const Weigh& weigh) const {
    const int64_t height = p_->padded_rows, strips = strips_;
    const T *strip = strip_, *x_strip = x + ld_;
    Vec<T> last{};
    if (strips == 1) {  // as for 49 columns: the sum stays in a register
      const T x_one = x_strip[0];
      Four<T> sum{};
      sweep_main(begin, end, x, s, [&](int64_t i, Four<T> y) __attribute__((always_inline)) {
        const Four<T> k = load<Four<T>>(strip + i), w = weigh(i, y + k * x_one);
        sum += k * w;
        return w;
      });
      last[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    } else {
      Four<T> sums[lanes<T> / 4 + 1] = {};
      sweep_main(begin, end, x, s, [&](int64_t i, Four<T> y) __attribute__((always_inline)) {
        for (int64_t c = 0; c < strips; ++c) y += load<Four<T>>(strip + c * height + i) * x_strip[c];
        const Four<T> w = weigh(i, y);
        for (int64_t c = 0; c < strips; ++c) sums[c] += load<Four<T>>(strip + c * height + i) * w;
        return w;
      });
      for (int64_t c = 0; c < strips; ++c) last[c] = (sums[c][0] + sums[c][1]) + (sums[c][2] + sums[c][3]);
    }
    if (strips > 0) store(s + ld_, last);
  }

  template <class Weigh>
  OTFACE_INLINE void sweep_main(int64_t begin, int64_t end, const T* x, T* s, const Weigh& weigh) const {
    const T* K = K_;
    switch (ld_ / lanes<T>) {
      case 1: return sweep_rows<T, 1>(K, ld_, begin, end, x, s, weigh);
      case 2: return sweep_rows<T, 2>(K, ld_, begin, end, x, s, weigh);
      case 3: return sweep_rows<T, 3>(K, ld_, begin, end, x, s, weigh);
      case 4: return sweep_rows<T, 4>(K, ld_, begin, end, x, s, weigh);
      default: return sweep_rows<T, 0>(K, ld_, begin, end, x, s, weigh);
    }
  }

  // The common first iteration, from g = 0: K_ij = exp((min_j C_ij - C_ij) / eps) and f0_i = min_j C_ij, in Real throughout:
  // the difference of two Reals is exact to rounding, so nothing is lost. False as in `build`.
  bool build_four_rows_from_zero(int64_t block, int64_t i) {
    using V = Vec<T>;
    constexpr int W = lanes<T>;
    const Problem<T>& p = *p_;
    const int64_t ld = ld_;
    const double exact_scale = p.inverse_eps() * log2_of_e,
                 largest = static_cast<double>(std::numeric_limits<T>::max());
    const T scale = static_cast<T>(exact_scale < largest ? exact_scale : largest);
    const T no_pair = static_cast<T>(infinity);
    int64_t stride;
    const T* c = p.cost.read_four(i, needs_padding(), rows_ + block * 4 * p.padded_cols, stride);
    auto fine = V{} == V{};
    V least_v[4];
    for (int q = 0; q < 4; ++q) {
      least_v[q] = load<V>(c + q * stride);
      for (int64_t j = 0; j < ld; j += W) {
        const V c_v = load<V>(c + q * stride + j);
        fine &= c_v > -no_pair;
        least_v[q] = vmin(c_v, least_v[q]);
      }
    }
    Four<T> least_strip = Four<T>{} + no_pair;
    for (int64_t s = 0; s < strips_; ++s) {
      const Four<T> costs = column_of_four(c + ld + s, stride);
      least_strip = vmin(costs, least_strip);
      if (any(~(costs > -no_pair))) return false;
    }
    if (any(~fine)) return false;
    const Four<T> least = vmin(least_lanes(least_v[0], least_v[1], least_v[2], least_v[3]), least_strip);
    bool ok = true;
    if (!any(~(least < no_pair))) {
      T* k = K_ + i * ld;
      for (int64_t j = 0; j < ld; j += W)
        for (int q = 0; q < 4; ++q) store(k + q * ld + j, vexp2((least[q] - load<V>(c + q * stride + j)) * scale));
      for (int q = 0; q < 4; ++q) f0_[i + q] = static_cast<double>(least[q]);
    } else {
      for (int64_t q = 0; q < 4 && i + q < p.rows; ++q) {
        if (!(least[q] < no_pair)) {
          ok = set_empty_row(i + q) && ok;
          continue;
        }
        f0_[i + q] = static_cast<double>(least[q]);
        T* k = K_ + (i + q) * ld;
        for (int64_t j = 0; j < ld; j += W) store(k + j, vexp2((least[q] - load<V>(c + q * stride + j)) * scale));
      }
    }
    if constexpr (W >= 4) {  // there are no strips else
      for (int64_t s = 0; s < strips_; ++s) {
        const Four<T> difference = least < no_pair ? least - column_of_four(c + ld + s, stride) : Four<T>{} - no_pair;
        V exponents{};
        store(reinterpret_cast<T*>(&exponents), difference * scale);
        store(strip_ + s * p.padded_rows + i, low_four<T>(vexp2(exponents)));
      }
    }
    return ok;
  }

  // Any g: f0_i = min_j (C_ij - g_j) over the columns that have weight, so that the largest of those entries of K is 1.
  bool build_four_rows(int64_t block, int64_t first) {
    const Problem<T>& p = *p_;
    T* c = rows_ + block * 4 * p.padded_cols;
    double* difference = difference_ + block * p.padded_cols;
    bool ok = true;
    for (int64_t i = first; i < (first + 4 < p.rows ? first + 4 : p.rows); ++i) {
      p.cost.read(i, c);
      if (has_nan_or_minus_infinity(c, p.padded_cols)) return false;
      for (int64_t j = 0; j < p.padded_cols; ++j) difference[j] = static_cast<double>(c[j]) - g0_[j];
      const double least = least_of(difference, p.skip, p.padded_cols);
      if (!(least < infinity)) {
        ok = set_empty_row(i) && ok;
        continue;
      }
      f0_[i] = least;
      for (int64_t j = 0; j < p.padded_cols; ++j) difference[j] = least - difference[j];
      store_exp(i, difference, c);
    }
    return ok;
  }

  bool set_empty_row(int64_t i) {
    for (int64_t j = 0; j < ld_; ++j) K_[i * ld_ + j] = 0;
    for (int64_t c = 0; c < strips_; ++c) strip_[c * p_->padded_rows + i] = 0;
    f0_[i] = 0;
    empty_row_[i] = 1;
    return !(p_->a[i] > 0);
  }

  // Row i of K = exp(difference / eps).
  void store_exp(int64_t i, const double* difference, T* buffer) {
    exp_of(difference, p_->inverse_eps(), p_->padded_cols, buffer);
    std::memcpy(K_ + i * ld_, buffer, static_cast<size_t>(ld_) * sizeof(T));
    for (int64_t c = 0; c < strips_; ++c) strip_[c * p_->padded_rows + i] = buffer[ld_ + c];
  }

  void fill_from_potentials() {
    const Problem<T>& p = *p_;
    for_blocks([&](int64_t block, int64_t begin, int64_t end) {
      T* c = rows_ + block * 4 * p.padded_cols;
      double* difference = difference_ + block * p.padded_cols;
      for (int64_t i = begin; i < (end < p.rows ? end : p.rows); ++i) {
        if (empty_row_[i] > 0) continue;
        p.cost.read(i, c);
        add_potentials(c, f0_[i], g0_.data(), p.padded_cols, difference);
        store_exp(i, difference, c);
      }
    });
  }

  // The second half, when column sums left the band: g from f by a column-wise log-sum-exp.
  // f0 becomes f, so that r = 1, and g0_j = min_i (C_ij - f_i) over the rows that have weight.
  bool build_columns(T* r, T* s) {
    const Problem<T>& p = *p_;
    subtract_eps_log(f0_.data(), p.eps, r, p.padded_rows, f0_.data());
    for_blocks([&](int64_t block, int64_t begin, int64_t end) {
      T* c = rows_ + block * 4 * p.padded_cols;
      double* least = difference_ + block * p.padded_cols;
      for (int64_t j = 0; j < p.padded_cols; ++j) least[j] = infinity;
      for (int64_t i = begin; i < (end < p.rows ? end : p.rows); ++i) {
        if (!(p.a[i] > 0)) continue;
        p.cost.read(i, c);
        for (int64_t j = 0; j < p.padded_cols; ++j) {
          const double x = static_cast<double>(c[j]) - f0_[i];
          least[j] = x < least[j] ? x : least[j];
        }
      }
    });
    for (int64_t j = 0; j < p.padded_cols; ++j) {
      double least = difference_[j];
      for (int64_t block = 1; block < p.blocks.count; ++block) {
        const double x = difference_[block * p.padded_cols + j];
        least = x < least ? x : least;
      }
      g0_[j] = least < infinity ? least : -infinity;
      if (least < infinity) continue;
      if (p.b[j] > 0) return false;
      empty_col_[j] = 1;
    }
    fill_from_potentials();
    for (int64_t j = 0; j < p.padded_cols; ++j)
      if (empty_col_[j] > 0) g0_[j] = 0;
    sweep(p.b, s, [&](int64_t i, Four<T>) {
      store(r + i, Four<T>{1, 1, 1, 1});
      return load<Four<T>>(p.a + i);
    });
    finish_sums(r, s);
    for (int64_t j = 0; j < p.cols; ++j) {
      if (!(s[j] < static_cast<T>(small_sum))) continue;
      const T scale = T(1) / s[j];
      T* entry = j < ld_ ? K_ + j : strip_ + (j - ld_) * p.padded_rows;
      for (int64_t i = 0; i < p.rows; ++i) entry[i * (j < ld_ ? ld_ : 1)] *= scale;
      g0_[j] -= p.eps * __builtin_log(static_cast<double>(s[j]));
      s[j] = 1;
    }
    return all_within(s, p.padded_cols, std::numeric_limits<T>::min(), std::numeric_limits<T>::max());
  }

  const Problem<T>* p_ = nullptr;
  const Executor* executor_ = nullptr;
  int64_t ld_ = 0, strips_ = 0;
  Buffer<T> K_, strip_;
  Buffer<double> f0_, g0_;
  Buffer<T> empty_row_, empty_col_;
  mutable Buffer<T> partial_;  // [blocks, padded_cols]: column sums of each block
  Buffer<double> difference_;  // [blocks, padded_cols]
  Buffer<T> rows_;             // [blocks, 4, padded_cols]
};

}  // namespace
}  // namespace otface::sinkhorn
