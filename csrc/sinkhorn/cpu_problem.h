// One problem of the batch, cut to its valid size, as the CPU kernels see it; and the loop over all of them.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
#pragma once

#include <cstddef>
#include <limits>

#include "common/cpu_buffer.h"
#include "common/cpu_half.h"
#include "common/cpu_run.h"
#include "common/vec.h"
#include "sinkhorn/band.h"
#include "sinkhorn/params.h"

namespace otface::sinkhorn {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// x 2^exponent. Where nothing is to be scaled, as nearly always, x as it is.
inline double times_power(double x, int exponent) { return exponent == 0 ? x : __builtin_ldexp(x, exponent); }

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class T>
class CostRows {
 public:
  CostRows() = default;
  CostRows(const CostView& view, int64_t batch_index, int64_t rows, int64_t cols, int64_t padded_cols, int exponent)
      : view_(view),
        exponent_(exponent),
        offset_(batch_index * view.batch_stride),
        rows_(rows),
        cols_(cols),
        padded_cols_(padded_cols) {
    // A whole vector may be read past the end of row i as long as that stays within the rows that follow.
    const int64_t past = padded_cols - cols;
    readable_rows_ = view.row_stride > 0 ? rows - (past + view.row_stride - 1) / view.row_stride : 0;
    if (past == 0) readable_rows_ = rows;
    is_real_ = exponent == 0 && view.dtype == (sizeof(T) == sizeof(double) ? DType::float64 : DType::float32);
  }

  // Rows i to i + 3, `stride` apart: where they lie, if they lie there as contiguous Reals and the caller needs no padding,
  // else as a copy in `buffer` [4, padded_cols], where rows past the end are all +inf.
  const T* read_four(int64_t i, bool needs_padding, T* buffer, int64_t& stride) const {
    if (is_real_ && view_.col_stride == 1 && !needs_padding && i + 4 <= rows_) {
      stride = view_.row_stride;
      return static_cast<const T*>(view_.data) + offset_ + i * stride;
    }
    stride = padded_cols_;
    for (int64_t q = 0; q < 4; ++q) {
      T* out = buffer + q * stride;
      if (i + q < rows_) {
        read(i + q, out);
      } else {
        for (int64_t j = 0; j < padded_cols_; ++j) out[j] = static_cast<T>(infinity);
      }
    }
    return buffer;
  }

  // Row i as contiguous Reals, with +inf (a forbidden pair) in the padding.
  void read(int64_t i, T* out) const {
    convert_row(i, out);
    if (exponent_ != 0) scale(out);
  }

 private:
  void convert_row(int64_t i, T* out) const {
    switch (view_.dtype) {
      case DType::float32: return copy<float>(i, out, [](float x) { return x; });
      case DType::float64: return copy<double>(i, out, [](double x) { return x; });
      case DType::float16: return copy<uint16_t>(i, out, half_to_float);
      case DType::bfloat16: return copy<uint16_t>(i, out, bfloat_to_float);
    }
  }

  // A cost that becomes too large for Real is not a forbidden pair: the problem has no solution.
  void scale(T* out) const {
    for (int64_t j = 0; j < cols_; ++j) {
      const T scaled = static_cast<T>(times_power(static_cast<double>(out[j]), exponent_));
      out[j] = scaled - scaled == 0 || out[j] - out[j] != 0 ? scaled : static_cast<T>(nan);
    }
  }

  template <class S, class Convert>
  void copy(int64_t i, T* out, Convert convert) const {
    const int64_t stride = view_.col_stride;
    const S* in = static_cast<const S*>(view_.data) + offset_ + i * view_.row_stride;
    if (stride == 1 && i < readable_rows_) {
      constexpr int W = lanes<T>;
      for (int64_t j = 0; j < padded_cols_; j += W)
        for (int k = 0; k < W; ++k) out[j + k] = static_cast<T>(convert(in[j + k]));
      if (padded_cols_ > cols_) {
        T* tail = out + padded_cols_ - W;
        const Vec<T> last = load<Vec<T>>(tail), forbidden = broadcast<Vec<T>>(static_cast<T>(infinity));
        store(tail, lane_numbers<T>() < static_cast<T>(cols_ - (padded_cols_ - W)) ? last : forbidden);
      }
      return;
    }
    for (int64_t j = 0; j < cols_; ++j) out[j] = static_cast<T>(convert(in[j * stride]));
    for (int64_t j = cols_; j < padded_cols_; ++j) out[j] = static_cast<T>(infinity);
  }
  CostView view_{};
  bool is_real_ = false;
  int exponent_ = 0;
  int64_t offset_ = 0, rows_ = 0, cols_ = 0, padded_cols_ = 0, readable_rows_ = 0;
};

// How the rows of a matrix are split into tasks. It depends on the shape alone, never on the number of threads, because
// the column sums of the blocks are added up in the order of the blocks: the result is the same for any number of threads.
struct RowBlocks {
  int64_t count = 1, rows = 0;

  RowBlocks() = default;
  RowBlocks(int64_t swept_rows, int64_t padded_cols) {
    const int64_t entries_per_block = 1 << 17, most_blocks = 64;
    if (swept_rows * padded_cols < 4 * entries_per_block) {
      rows = swept_rows;
      return;
    }
    rows = entries_per_block / padded_cols;
    if (rows < swept_rows / most_blocks) rows = swept_rows / most_blocks;
    rows = round_up(rows > 0 ? rows : 1, 4);
    count = (swept_rows + rows - 1) / rows;
  }
  int64_t begin(int64_t block) const { return block * rows; }
  int64_t end(int64_t block, int64_t total) const {
    const int64_t last = (block + 1) * rows;
    return last < total ? last : total;
  }
};

template <class T>
struct Problem {
  int64_t index = 0;  // in the batch
  int64_t rows = 0, cols = 0;
  int64_t swept_rows = 0;   // rows rounded up to 4: what a sweep reads
  int64_t padded_rows = 0;  // rows rounded up to the lanes (and 4): the length of arrays over rows
  int64_t padded_cols = 0;  // cols rounded up to the lanes: the length of arrays over columns
  double eps = 1;
  // Where an eps or a mass is extreme, the problem at hand is another one, in which costs, eps and potentials are multiplied by
  // 2^cost_exponent, weights and plan by 2^mass_exponent: exact in both directions. Else both are 0.
  int cost_exponent = 0, mass_exponent = 0;
  bool valid = false;          // false: eps, weights or lengths cannot be used; the outputs are NaN
  bool has_zero_in_b = false;  // some column of zero weight: it has no say in what a row is compared with
  double mass_a = 0, mass_b = 0;
  CostRows<T> cost;
  RowBlocks blocks;
  Buffer<T> a, b;       // [padded_rows], [padded_cols], zero in the padding
  Buffer<double> skip;  // [padded_cols]: +inf where b is zero, else 0

  void read(const Problems& problems, int64_t batch_index) {
    index = batch_index;
    const bool rows_ok = read_length(problems.row_lengths, problems.n, rows);
    const bool cols_ok = read_length(problems.col_lengths, problems.m, cols);
    swept_rows = round_up(rows, 4);
    padded_rows = round_up(rows, lanes<T> > 4 ? lanes<T> : 4);
    padded_cols = round_up(cols, lanes<T>);
    blocks = RowBlocks(swept_rows, padded_cols);
    eps = problems.eps[batch_index * problems.eps_stride];
    cost_exponent = eps < Extremes<T>::least_eps ? 64 : 0;  // makes normal numbers of the subnormal ones of both types
    eps = times_power(eps, cost_exponent);
    cost = CostRows<T>(problems.cost, batch_index, rows, cols, padded_cols, cost_exponent);
    bool zero_in_a = false;
    const bool a_ok = problems.is_double ? read_weights<double>(problems.a, rows, padded_rows, a, mass_a, zero_in_a)
                                         : read_weights<float>(problems.a, rows, padded_rows, a, mass_a, zero_in_a);
    const bool b_ok = problems.is_double ? read_weights<double>(problems.b, cols, padded_cols, b, mass_b, has_zero_in_b)
                                         : read_weights<float>(problems.b, cols, padded_cols, b, mass_b, has_zero_in_b);
    const bool masses_ok = a_ok && b_ok && scale_weights();
    skip.resize(padded_cols);
    for (int64_t j = 0; j < padded_cols; ++j) skip[j] = b[j] > 0 ? 0.0 : infinity;
    valid = rows_ok && cols_ok && masses_ok && eps > 0 && eps < infinity &&
            __builtin_fabs(mass_a - mass_b) <= problems.mass_tolerance * (mass_a > mass_b ? mass_a : mass_b);
  }

  // f + g of the problem as it was given is so much more than that of the one at hand.
  double extra_potential() const { return mass_exponent == 0 ? 0.0 : eps * mass_exponent * 0.69314718055994531; }

  // Finite also for the least eps: a difference of 0 stays 0.
  double inverse_eps() const {
    const double largest = std::numeric_limits<double>::max();
    return 1 / eps < largest ? 1 / eps : largest;
  }

 private:
  // Brings an extreme mass to about 1. False where the costs are scaled already: a gradient could have no digit left.
  bool scale_weights() {
    const double mass = mass_a > mass_b ? mass_a : mass_b;
    mass_exponent = 0;
    if (mass >= Extremes<T>::least_mass && mass <= Extremes<T>::most_mass) return true;
    mass_exponent = -__builtin_ilogb(mass);
    for (int64_t i = 0; i < rows; ++i) a[i] = static_cast<T>(times_power(static_cast<double>(a[i]), mass_exponent));
    for (int64_t j = 0; j < cols; ++j) b[j] = static_cast<T>(times_power(static_cast<double>(b[j]), mass_exponent));
    mass_a = times_power(mass_a, mass_exponent);
    mass_b = times_power(mass_b, mass_exponent);
    return cost_exponent == 0;
  }
  bool read_length(const int64_t* lengths, int64_t size, int64_t& length) const {
    length = lengths == nullptr ? size : lengths[index];
    if (length >= 1 && length <= size) return true;
    length = size;
    return false;
  }
  template <class Real>
  bool read_weights(const WeightsView& view, int64_t count, int64_t padded, Buffer<T>& out, double& mass,
                    bool& has_zero) {
    out.resize(padded);
    bool ok = true;
    mass = 0;
    has_zero = false;
    if (view.data == nullptr) {
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(1.0 / static_cast<double>(count));
      mass = 1;
    } else {
      const Real* in = static_cast<const Real*>(view.data) + index * view.batch_stride;
      for (int64_t i = 0; i < count; ++i) {
        const T w = static_cast<T>(in[i * view.stride]);
        out[i] = w;
        mass += static_cast<double>(w);
        ok = ok && w >= 0;
        has_zero = has_zero || w == 0;
      }
      ok = ok && mass > 0 && mass < infinity;
    }
    for (int64_t i = count; i < padded; ++i) out[i] = 0;
    return ok;
  }
};

// Where one problem of the batch is large and the batch is smaller than the number of threads, the threads share the rows
// of one problem at a time; else each thread takes the next problem that nobody has. Either way the result is the same.
template <class T>
bool splits_rows(const Problems& problems, const Executor& executor) {
  return problems.batch < executor.threads &&
         RowBlocks(round_up(problems.n, 4), round_up(problems.m, lanes<T>)).count > 1;
}

// Calls work(executor, next) once per thread: next() is the index of a problem to solve, or -1 when none is left, and
// `executor` is what that work may use inside one problem.
template <class T, class Work>
void for_each_worker(const Problems& problems, const Executor& executor, const Work& work) {
  const Executor alone{1, run_serially};
  const bool together = splits_rows<T>(problems, executor);
  run_in_turn(together ? alone : executor, problems.batch,
              [&](const auto& next) { work(together ? executor : alone, next); });
}

}  // namespace
}  // namespace otface::sinkhorn
