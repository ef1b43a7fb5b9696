// K in the registers of 16 or 32 lanes of a warp: the register tier.
//
//   r = K x,   s = K^T w
//
// Threads. The lanes of a team form a grid of LaneRows x LaneCols; lane (p, q) holds the tile of rows p * TileRows + ..,
// columns q * TileCols + .. of K, TileRows x TileCols registers. Every K entry is in one register, and an iteration is two
// multiply-adds per register:
//
//   y_i = sum over the tile's columns of K_ij x_j, then over the LaneCols lanes that share the rows: `reduce`
//   w_i is computed by the owner of row i, then given to the LaneCols lanes that need it:            `gather`
//   and the same for the columns, with rows and columns changed.
//
// Exchange without selects. The rows of a tile are LaneCols chunks of C rows, and a few left over (13 = 4 * 3 + 1). Lane
// (p, q) owns chunk q of its tile's rows. It keeps chunk q ^ t in place t: so what lies in place t belongs to the lane whose
// number differs by t, whose own copy lies in place 0. `reduce` and `gather` exchange place t with that lane, with
// register numbers and lane masks that are known when compiling: (LaneCols - 1) * C shuffles each. The rows left over are
// summed by a butterfly and known to all; the lane with q = 0 counts them.
//
// Shared memory, per team: the cost as T, [max_rows, ld] with +inf in the padding and an odd ld (so that neighbouring rows
// start in other banks), read once from global memory however it is strided there; and vectors. Sizes are those of the tiles,
// not of the problem: a register's place is then known when compiling, up to its chunk. Global memory is not touched inside
// the iteration.
#pragma once

#include <type_traits>

#include "sinkhorn/team.cuh"

namespace otface::sinkhorn {

template <class T_, int LaneRows, int LaneCols, int TileRows, int TileCols>
class RegisterMatrix {
 public:
  using T = T_;
  static constexpr int lanes = LaneRows * LaneCols;
  static constexpr int teams_per_block = 32 / lanes;
  static constexpr int tile_rows = TileRows, tile_cols = TileCols;
  static constexpr int max_rows = LaneRows * TileRows, max_cols = LaneCols * TileCols;

  // A vector of owned entries, in registers.
  template <int Count>
  struct Owned {
    T v[Count];
    __host__ __device__ Owned(Arena&, int) {}
    OTFACE_DEVICE Owned() {}
    OTFACE_DEVICE T& operator[](int k) { return v[k]; }
    OTFACE_DEVICE const T& operator[](int k) const { return v[k]; }
  };
  static constexpr int chunk_rows = TileRows / LaneCols, own_rows = chunk_rows + TileRows % LaneCols;
  static constexpr int chunk_cols = TileCols / LaneRows, own_cols = chunk_cols + TileCols % LaneRows;
  using RowVector = Owned<own_rows>;
  using ColVector = Owned<own_cols>;

  // Which owned rows or columns are marked; value(k) is 1 there, else 0, and is added to their sums. A number for each is
  // quickest; where numbers take two registers, they are bits of one.
  template <int Count>
  struct MarksAsNumbers {
    T v[Count];
    __host__ __device__ MarksAsNumbers(Arena&, int) {}
    OTFACE_DEVICE T value(int k) const { return v[k]; }
    OTFACE_DEVICE bool get(Slot slot) const { return v[slot.k] != 0; }
    OTFACE_DEVICE void set(Slot slot, bool marked) { v[slot.k] = marked ? T(1) : T(0); }
  };
  struct MarksAsBits {
    unsigned bits = 0;
    __host__ __device__ MarksAsBits(Arena&, int) {}
    OTFACE_DEVICE T value(int k) const { return (bits >> k & 1) != 0 ? T(1) : T(0); }
    OTFACE_DEVICE bool get(Slot slot) const { return (bits >> slot.k & 1) != 0; }
    OTFACE_DEVICE void set(Slot slot, bool marked) { bits = (bits & ~(1u << slot.k)) | (marked ? 1u << slot.k : 0u); }
  };
  template <int Count>
  using Marks = std::conditional_t<sizeof(T) == 4, MarksAsNumbers<Count>, MarksAsBits>;
  using RowMarks = Marks<own_rows>;
  using ColMarks = Marks<own_cols>;

  // A vector in the team's memory has room for padding.
  __host__ __device__ static int row_count(int64_t) { return max_rows; }
  __host__ __device__ static int col_count(int64_t) { return max_cols; }

  static constexpr int ld = max_cols | 1;
  struct Layout {
    T* cost;  // [max_rows, ld]
    __host__ __device__ Layout(Arena& arena, int64_t, int64_t, int) : cost(arena.take<T>(max_rows * ld)) {}
  };

  OTFACE_DEVICE RegisterMatrix(const Problem& problem, const Layout& layout) : p_(problem), cost_(layout.cost) {
    const int in_team = simt::thread_index() % lanes;
    team_ = simt::thread_index() / lanes;
    lane_row_ = in_team / LaneCols;
    lane_col_ = in_team % LaneCols;
    OTFACE_UNROLL
    for (int r = 0; r < TileRows; ++r) {
      OTFACE_UNROLL
      for (int c = 0; c < TileCols; ++c) K_[r][c] = 0;
    }
  }

  OTFACE_DEVICE static bool is_first_here() { return thread_in_team() == 0; }
  OTFACE_DEVICE static int team_in_block() { return simt::thread_index() / lanes; }
  // Read anew each time, rather than kept in a register.
  OTFACE_DEVICE static int thread_in_team() { return simt::opaque(simt::thread_index()) % lanes; }
  OTFACE_DEVICE static int team_threads() { return lanes; }

  // The cost into shared memory. Everything after the first sync() may use it.
  OTFACE_DEVICE void read_cost(const Problems& all) {
    switch (all.cost.dtype) {
      case DType::float32: return copy_cost<float>(all.cost, [](float c) { return c; });
      case DType::float64: return copy_cost<double>(all.cost, [](double c) { return c; });
      case DType::float16: return copy_cost<uint16_t>(all.cost, simt::half_to_float);
      default: return copy_cost<uint16_t>(all.cost, simt::bfloat_to_float);
    }
  }

  OTFACE_DEVICE T cost(int i, int j) const { return cost_[i * ld + j]; }

  // --- the team ---

  OTFACE_DEVICE void sync(simt::Where where = simt::Where::current()) const { simt::sync_warp(where); }
  // For what only one kind of tier needs a barrier. Here a sweep gives its sums to the owners of the rows and columns, but orders
  // nothing; and a row or column left over has several lanes that hold it, though only one writes it to memory.
  OTFACE_DEVICE void sync_in_registers(simt::Where where = simt::Where::current()) const { sync(where); }
  OTFACE_DEVICE void sync_in_memory() const {}
  OTFACE_DEVICE bool any_in_domain(bool x) const { return simt::any_in_warp(x); }
  OTFACE_DEVICE bool all(bool x) const {
    const unsigned mine = lanes == 32 ? simt::full_mask : ((1u << (lanes & 31)) - 1u) << (team_ * lanes);
    return (simt::ballot(!x) & mine) == 0;
  }

  template <class F>
  OTFACE_DEVICE void rows(F f) const {
    OTFACE_UNROLL
    for (int k = 0; k < own_rows; ++k) f(row_slot(k));
  }
  template <class F>
  OTFACE_DEVICE void cols(F f) const {
    OTFACE_UNROLL
    for (int k = 0; k < own_cols; ++k) f(col_slot(k));
  }
  template <int N, class F>
  OTFACE_DEVICE void sum_rows(double (&sums)[N], F add) const {
    for (int c = 0; c < N; ++c) sums[c] = 0;
    rows([&](Slot row) {
      if (row.counts) add(row, sums);
    });
    sum_over_team(sums);
  }
  template <int N, class F>
  OTFACE_DEVICE void sum_cols(double (&sums)[N], F add) const {
    for (int c = 0; c < N; ++c) sums[c] = 0;
    cols([&](Slot col) {
      if (col.counts) add(col, sums);
    });
    sum_over_team(sums);
  }

  // x = y for teams in `mask`; y is lost.
  template <int Count>
  OTFACE_DEVICE static void replace(Owned<Count>& x, Owned<Count>& y, bool mask) {
    OTFACE_UNROLL
    for (int k = 0; k < Count; ++k) x[k] = mask ? y[k] : x[k];
  }

  // --- K ---

  // y = K x;  w_i = weigh(row, y_i, ok);  s = K^T w;  settle(col, s_j, ok). Whether all of the team's `ok` stayed true.
  template <class Weigh, class Settle>
  OTFACE_DEVICE bool sweep(const ColVector& x, Weigh weigh, Settle settle) const {
    return sweep_from(x, [](int) { return T(0); }, weigh, [](int) { return T(0); }, settle);
  }
  // The same with 1 added to y and s where a row or column is marked.
  template <class Weigh, class Settle>
  OTFACE_DEVICE bool sweep(const ColVector& x, const RowMarks& marked_rows, Weigh weigh, const ColMarks& marked_cols,
                           Settle settle) const {
    return sweep_from(
        x, [&](int k) { return marked_rows.value(k); }, weigh, [&](int k) { return marked_cols.value(k); }, settle);
  }

  // f_i = -eps log sum_j b_j exp((g_j - C_ij) / eps), for teams in `mask`. A row without an allowed pair becomes `empty`, with
  // f = 0. False: the cost has a NaN or a -inf, or such a row has weight. K is not touched: a lane takes a row at a time, in a
  // loop, since a second unrolled tile of costs would not fit beside K.
  OTFACE_DEVICE bool update_f(const double* g, const T* a, const T* b, double* f, RowMarks& empty, bool mask) {
    bool g_is_zero = true;
    for (int j = thread_in_team(); j < p_.cols; j += lanes) g_is_zero = g_is_zero && g[j] == 0;
    // The common start, g = 0: the difference of two Ts is exact to rounding, so nothing is lost by staying with T.
    const bool plain = all(g_is_zero) && !p_.has_zero_in_b;
    bool ok = true;
    if (any_in_domain(mask && plain)) {
      const T scale = static_cast<T>(least_of(p_.to_exponent, static_cast<double>(LargestOf<T>::value)));
      const auto reduced = [](T c, int) { return c; };
      if (mask && plain) ok = update_rows(scale, b, f, reduced);
    }
    if (any_in_domain(mask && !plain)) {
      const auto reduced = [g](T c, int j) { return static_cast<double>(c) - g[j]; };
      if (mask && !plain) ok = update_rows(p_.to_exponent, b, f, reduced);
    }
    sync();
    rows([&](Slot row) {
      const bool is_empty = !(f[row.i] < kInfinity);
      if (mask) empty.set(row, is_empty);
      ok = ok && !(is_empty && row.i < p_.rows && a[row.i] > 0);
    });
    sync();
    clear_infinities(f, max_rows, mask);
    return all(ok || !mask);
  }

  // g_j = -eps log sum_i a_i exp((f_i - C_ij) / eps), likewise.
  OTFACE_DEVICE bool update_g(const double* f, const T* a, const T* b, double* g, ColMarks& empty, bool mask) {
    bool ok = true;
    if (mask) {
      for (int j = thread_in_team(); j < max_cols; j += lanes) {
        double least = kInfinity;
        for (int i = 0; i < p_.rows; ++i)
          if (a[i] > 0) least = least_of(static_cast<double>(cost(i, j)) - f[i], least);
        T sum = 0;
        for (int i = 0; i < p_.rows; ++i) {
          const double difference = least - (static_cast<double>(cost(i, j)) - f[i]);
          sum += a[i] * capped_exp2(static_cast<T>(difference * p_.to_exponent));
        }
        ok = ok && (!(least < kInfinity) || sum >= Band<T>::least_normal);
        g[j] = least < kInfinity ? least - p_.eps * simt::log_of(static_cast<double>(sum)) : kInfinity;
      }
    }
    sync();
    cols([&](Slot col) {
      const bool is_empty = !(g[col.i] < kInfinity);
      if (mask) empty.set(col, is_empty);
      ok = ok && !(is_empty && col.i < p_.cols && b[col.i] > 0);
    });
    sync();
    clear_infinities(g, max_cols, mask);
    return all(ok || !mask);
  }

  // K_ij = exp((f_i + g_j - C_ij) / eps), for every team: one that had no need of it gets the same bits again.
  OTFACE_DEVICE void fill(const double* f, const double* g) {
    forget_places();
    const T scale = static_cast<T>(least_of(p_.to_exponent, static_cast<double>(LargestOf<T>::value)));
    T f_high[TileRows], f_low[TileRows];
    OTFACE_UNROLL
    for (int r = 0; r < TileRows; ++r) split(f[tile_row(r)], f_high[r], f_low[r]);
    OTFACE_UNROLL
    for (int c = 0; c < TileCols; ++c) {
      const int j = tile_col(c);
      T g_high, g_low;
      split(g[j], g_high, g_low);
      OTFACE_UNROLL
      for (int r = 0; r < TileRows; ++r) {
        const T difference = exact_difference(f_high[r], f_low[r], g_high, g_low, cost(tile_row(r), j));
        K_[r][c] = capped_exp2(difference * scale);
      }
    }
  }

  // entry(i, j, K_ij, by_row, by_col, writes) adds to NR sums per row and NC sums per column; row(slot, sums) and col(slot, sums)
  // receive them. The padding is visited too, with K = 0.
  template <int NR, int NC, class Entry, class Row, class Col>
  OTFACE_DEVICE void reduce_entries(Entry entry, Row row, Col col) {
    forget_places();
    T by_row[NR > 0 ? NR : 1][TileRows] = {}, by_col[NC > 0 ? NC : 1][TileCols] = {};
    OTFACE_UNROLL
    for (int r = 0; r < TileRows; ++r) {
      OTFACE_UNROLL
      for (int c = 0; c < TileCols; ++c) {
        const int i = tile_row(r), j = tile_col(c);
        T to_row[NR > 0 ? NR : 1] = {}, to_col[NC > 0 ? NC : 1] = {};
        entry(i, j, K_[r][c], to_row, to_col, true);
        OTFACE_UNROLL
        for (int k = 0; k < NR; ++k) by_row[k][r] += to_row[k];
        OTFACE_UNROLL
        for (int k = 0; k < NC; ++k) by_col[k][c] += to_col[k];
      }
    }
    RowVector row_sums[NR > 0 ? NR : 1];
    OTFACE_UNROLL
    for (int k = 0; k < NR; ++k) row_sums[k] = reduce_rows(by_row[k], Add());
    ColVector col_sums[NC > 0 ? NC : 1];
    OTFACE_UNROLL
    for (int k = 0; k < NC; ++k) col_sums[k] = reduce_cols(by_col[k], Add());
    rows([&](Slot slot) {
      T sums[NR > 0 ? NR : 1];
      OTFACE_UNROLL
      for (int k = 0; k < NR; ++k) sums[k] = row_sums[k][slot.k];
      row(slot, sums);
    });
    cols([&](Slot slot) {
      T sums[NC > 0 ? NC : 1];
      OTFACE_UNROLL
      for (int k = 0; k < NC; ++k) sums[k] = col_sums[k][slot.k];
      col(slot, sums);
    });
  }

  // A sum of outer products, in registers beside K.
  struct OuterProducts {
    T sum[TileRows][TileCols];
    __host__ __device__ OuterProducts(Arena&, int64_t, int64_t) {}
  };
  OTFACE_DEVICE void clear(OuterProducts& products) const {
    OTFACE_UNROLL
    for (int r = 0; r < TileRows; ++r) {
      OTFACE_UNROLL
      for (int c = 0; c < TileCols; ++c) products.sum[r][c] = 0;
    }
  }
  OTFACE_DEVICE void add_product(OuterProducts& products, const RowVector& left, const ColVector& right, T*, int64_t) {
    T l[TileRows], r[TileCols];
    gather_rows(left, l);
    gather_cols(right, r);
    OTFACE_UNROLL
    for (int i = 0; i < TileRows; ++i) {
      OTFACE_UNROLL
      for (int j = 0; j < TileCols; ++j) products.sum[i][j] += l[i] * r[j];
    }
  }
  // out_ij += K_ij sum_ij, and the sum becomes zero. `out` is the team's own matrix, null if nobody wants it.
  OTFACE_DEVICE void flush(OuterProducts& products, T* out, int64_t out_ld) {
    OTFACE_UNROLL
    for (int r = 0; r < TileRows; ++r) {
      OTFACE_UNROLL
      for (int c = 0; c < TileCols; ++c) {
        const int i = tile_row(r), j = tile_col(c);
        if (out != nullptr && i < p_.rows && j < p_.cols) out[i * out_ld + j] += K_[r][c] * products.sum[r][c];
        products.sum[r][c] = 0;
      }
    }
  }

 private:
  struct Add {
    template <class U>
    OTFACE_DEVICE U operator()(U a, U b) const {
      return a + b;
    }
  };
  struct Least {
    template <class U>
    OTFACE_DEVICE U operator()(U a, U b) const {
      return least_of(a, b);
    }
  };

  // row_start(k), col_start(k): what the sums of an owned row or column begin with.
  template <class RowStart, class Weigh, class ColStart, class Settle>
  OTFACE_DEVICE bool sweep_from(const ColVector& x, RowStart row_start, Weigh weigh, ColStart col_start,
                                Settle settle) const {
    bool ok = true;
    T x_tile[TileCols], y[TileRows];
    gather_cols(x, x_tile);
    OTFACE_UNROLL
    for (int r = 0; r < TileRows; ++r)
      y[r] = r < chunk_rows ? row_start(r) + K_[r][0] * x_tile[0] : K_[r][0] * x_tile[0];
    OTFACE_UNROLL
    for (int c = 1; c < TileCols; ++c) {
      OTFACE_UNROLL
      for (int r = 0; r < TileRows; ++r) y[r] += K_[r][c] * x_tile[c];
    }
    RowVector w = reduce_rows(y, Add());
    rows([&](Slot row) {
      if (row.k >= chunk_rows) w[row.k] += row_start(row.k);
      w[row.k] = weigh(row, w[row.k], ok);
    });
    T w_tile[TileRows], s[TileCols];
    gather_rows(w, w_tile);
    OTFACE_UNROLL
    for (int c = 0; c < TileCols; ++c)
      s[c] = c < chunk_cols ? col_start(c) + K_[0][c] * w_tile[0] : K_[0][c] * w_tile[0];
    OTFACE_UNROLL
    for (int r = 1; r < TileRows; ++r) {
      OTFACE_UNROLL
      for (int c = 0; c < TileCols; ++c) s[c] += K_[r][c] * w_tile[r];
    }
    ColVector sums = reduce_cols(s, Add());
    cols([&](Slot col) {
      if (col.k >= chunk_cols) sums[col.k] += col_start(col.k);
      settle(col, sums[col.k], ok);
    });
    return all(ok);
  }

  // What is seldom computed from the lane's place shall not be kept through the iterations.
  OTFACE_DEVICE void forget_places() {
    lane_row_ = simt::opaque(lane_row_);
    lane_col_ = simt::opaque(lane_col_);
  }

  // Where register r of a tile lies in the matrix.
  OTFACE_DEVICE int tile_row(int r) const {
    const int local = r < LaneCols * chunk_rows
                          ? (lane_col_ ^ r / at_least_one(chunk_rows)) * chunk_rows + r % at_least_one(chunk_rows)
                          : r;
    return lane_row_ * TileRows + local;
  }
  OTFACE_DEVICE int tile_col(int c) const {
    const int local = c < LaneRows * chunk_cols
                          ? (lane_row_ ^ c / at_least_one(chunk_cols)) * chunk_cols + c % at_least_one(chunk_cols)
                          : c;
    return lane_col_ * TileCols + local;
  }
  __host__ __device__ static constexpr int at_least_one(int x) { return x > 0 ? x : 1; }

  OTFACE_DEVICE Slot row_slot(int k) const {
    const bool in_chunk = k < chunk_rows;
    const int local = in_chunk ? lane_col_ * chunk_rows + k : LaneCols * chunk_rows + (k - chunk_rows);
    return {k, lane_row_ * TileRows + local, true, in_chunk || lane_col_ == 0};
  }
  OTFACE_DEVICE Slot col_slot(int k) const {
    const bool in_chunk = k < chunk_cols;
    const int local = in_chunk ? lane_row_ * chunk_cols + k : LaneRows * chunk_cols + (k - chunk_cols);
    return {k, lane_col_ * TileCols + local, true, in_chunk || lane_row_ == 0};
  }

  // `Size` values per lane, of a line of `Count` lanes that lie `Step` apart: each lane's own part of the sums, in the order
  // of the slots.
  template <int Size, int Count, int Step, class U, class Op>
  OTFACE_DEVICE static void reduce(const U (&tile)[Size], U* own, Op op) {
    constexpr int chunk = Size / Count, rest = Size % Count;
    OTFACE_UNROLL
    for (int k = 0; k < chunk; ++k) own[k] = tile[k];
    OTFACE_UNROLL
    for (int t = 1; t < Count; ++t) {
      OTFACE_UNROLL
      for (int k = 0; k < chunk; ++k) own[k] = op(own[k], simt::shuffle_xor(tile[t * chunk + k], t * Step));
    }
    OTFACE_UNROLL
    for (int k = 0; k < rest; ++k) {
      U x = tile[Count * chunk + k];
      OTFACE_UNROLL
      for (int bit = 1; bit < Count; bit *= 2) x = op(x, simt::shuffle_xor(x, bit * Step));
      own[chunk + k] = x;
    }
  }
  template <int Size, int Count, int Step, class U>
  OTFACE_DEVICE static void gather(const U* own, U (&tile)[Size]) {
    constexpr int chunk = Size / Count, rest = Size % Count;
    OTFACE_UNROLL
    for (int k = 0; k < chunk; ++k) tile[k] = own[k];
    OTFACE_UNROLL
    for (int t = 1; t < Count; ++t) {
      OTFACE_UNROLL
      for (int k = 0; k < chunk; ++k) tile[t * chunk + k] = simt::shuffle_xor(own[k], t * Step);
    }
    OTFACE_UNROLL
    for (int k = 0; k < rest; ++k) tile[Count * chunk + k] = own[chunk + k];
  }

  template <class Op>
  OTFACE_DEVICE RowVector reduce_rows(const T (&tile)[TileRows], Op op) const {
    RowVector own;
    reduce<TileRows, LaneCols, 1>(tile, own.v, op);
    return own;
  }
  template <class Op>
  OTFACE_DEVICE ColVector reduce_cols(const T (&tile)[TileCols], Op op) const {
    ColVector own;
    reduce<TileCols, LaneRows, LaneCols>(tile, own.v, op);
    return own;
  }
  OTFACE_DEVICE void gather_rows(const RowVector& own, T (&tile)[TileRows]) const {
    gather<TileRows, LaneCols, 1>(own.v, tile);
  }
  OTFACE_DEVICE void gather_cols(const ColVector& own, T (&tile)[TileCols]) const {
    gather<TileCols, LaneRows, LaneCols>(own.v, tile);
  }

  template <int N>
  OTFACE_DEVICE void sum_over_team(double (&sums)[N]) const {
    OTFACE_UNROLL
    for (int c = 0; c < N; ++c) {
      OTFACE_UNROLL
      for (int bit = 1; bit < lanes; bit *= 2) sums[c] += simt::shuffle_xor(sums[c], bit);
    }
  }

  // Row by row, the lanes side by side; several rows are on their way at a time.
  template <class S, class Convert>
  OTFACE_DEVICE void copy_cost(const CostView& view, Convert convert) const {
    const S* row = static_cast<const S*>(view.data) + p_.index * view.batch_stride;
    const int rows = p_.rows, cols = p_.cols, lane = thread_in_team();
    OTFACE_UNROLL_BY_4
    for (int i = 0; i < max_rows; ++i, row += view.row_stride) {
      OTFACE_UNROLL
      for (int first = 0; first < max_cols; first += lanes) {
        const int j = first + lane;
        T c = static_cast<T>(kInfinity);
        if (i < rows && j < cols) c = static_cast<T>(convert(row[j * view.col_stride]));
        if (j < max_cols) cost_[i * ld + j] = c;
      }
    }
  }

  // reduced(C_ij, j) = C_ij - g_j, in the type that the differences need.
  template <class U, class Reduced>
  OTFACE_DEVICE bool update_rows(U scale, const T* b, double* f, Reduced reduced) const {
    bool ok = true;
    for (int i = thread_in_team(); i < max_rows; i += lanes) {
      U least = static_cast<U>(kInfinity);
      for (int j = 0; j < p_.cols; ++j) {
        const T c = cost(i, j);
        ok = ok && c > static_cast<T>(-kInfinity);
        if (b[j] > 0) least = least_of(static_cast<U>(reduced(c, j)), least);
      }
      T sum = 0;
      for (int j = 0; j < p_.cols; ++j)
        sum += b[j] * capped_exp2(static_cast<T>((least - reduced(cost(i, j), j)) * scale));
      const bool is_empty = !(least < static_cast<U>(kInfinity));
      ok = ok && (is_empty || sum >= Band<T>::least_normal);
      f[i] = is_empty ? kInfinity : static_cast<double>(least) - p_.eps * simt::log_of(static_cast<double>(sum));
    }
    return ok;
  }

  OTFACE_DEVICE void clear_infinities(double* x, int count, bool mask) const {
    if (mask)
      for (int k = thread_in_team(); k < count; k += lanes)
        if (!(x[k] < kInfinity)) x[k] = 0;
    sync();
  }

  const Problem&
      p_;  // lies beside the matrix, not around it: two objects that point at each other stay out of registers
  T K_[TileRows][TileCols];
  T* cost_;
  int team_, lane_row_, lane_col_;
};

}  // namespace otface::sinkhorn
