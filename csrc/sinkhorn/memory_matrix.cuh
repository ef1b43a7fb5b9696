// K in memory: in the shared memory of one block (the shared tier), or in global memory, with a gang of blocks of one
// cooperative launch at work on it (the stream tier).
//
//   r = K x,   s = K^T w      in one sweep over the rows of K, so that K is read once per iteration
//
// Threads. The rows are cut into stripes, one after the other; a stripe is swept by a *unit*: a warp in the shared tier, a
// block in the stream tier. The unit takes four rows at a time; each of its threads holds 8 columns of them in registers:
//
//   y_i = K_i . x over the thread's columns, then over the unit (`unit_sum`: shuffles, and one barrier in a block)
//   s_j += w_i K_ij for the four rows while they are still in registers
//
// so a stripe leaves its column sums in registers, writes them once (`partial`), and after one barrier of the team the owner
// of column j adds up those of all stripes, in their order. Matrices wider than 8 columns per thread are taken in panels:
// the rows are then read a second time (from the cache), and the column sums kept in `partial`.
//
// Stripes depend on the shape alone, never on how many blocks or warps work on a problem: the results are the same bits.
//
// Shared memory. Shared tier: K, `partial`, all vectors and `Scratch`. Stream tier: `Scratch`, and in float32 `Ring`: three
// times four rows, copied past the registers, of which each thread reads what it has asked for itself.
// Bytes moved per iteration in the stream tier, up to 4,096 columns: sizeof(T) * n * m for K, and 1/8 of that at most for
// `partial`. Beyond: K twice, the second time from the cache, and half of K for `partial`.
#pragma once

#include <type_traits>

#include "sinkhorn/team.cuh"

namespace otface::sinkhorn {

constexpr int kMostWarps = 16;
constexpr int kColumnsPerThread = 8;
constexpr int kRowsAtATime = 4;
constexpr int kLanesPerRow = 32 / kRowsAtATime;  // of a warp, when each of its threads has one of the rows
constexpr int kStages = 3;    // that a gang's block keeps on their way, where they fit its shared memory
constexpr int kOwners = 256;  // of rows and columns, in a block by itself: it may have more threads, with the same bits
constexpr int kMostSums = 4;  // that sum_rows and sum_cols form at once

// How the rows of a problem are cut. A stripe of a gang has at least 16 rows, so that `partial` is small against K.
__host__ __device__ constexpr int least_stripe_rows(bool gang) { return gang ? 16 : kRowsAtATime; }
__host__ __device__ constexpr int stripe_limit(bool gang) { return gang ? 512 : kMostWarps; }
__host__ __device__ inline int rows_per_stripe(bool gang, int rows) {
  const int limit = stripe_limit(gang), least = least_stripe_rows(gang);
  const int whole = ((rows + limit - 1) / limit + kRowsAtATime - 1) / kRowsAtATime * kRowsAtATime;
  return whole > least ? whole : least;
}
// The most stripes that a problem of up to n rows has: one of fewer rows may have more than the one of n.
__host__ __device__ inline int64_t most_stripes(bool gang, int64_t n) {
  const int64_t of_least_height = (n + least_stripe_rows(gang) - 1) / least_stripe_rows(gang);
  return of_least_height < stripe_limit(gang) ? of_least_height : stripe_limit(gang);
}

template <class T_, bool Gang>
class MemoryMatrix {
 public:
  using T = T_;
  static constexpr int teams_per_block = 1;
  static constexpr int pack = 16 / static_cast<int>(sizeof(T));
  static constexpr int packs = kColumnsPerThread / pack;

  // A vector in the team's memory, indexed by row or column.
  struct Vector {
    T* v;
    __host__ __device__ explicit Vector(T* x) : v(x) {}
    __host__ __device__ Vector(Arena& arena, int64_t count) : v(arena.take<T>(count)) {}
    OTFACE_DEVICE T& operator[](int k) const { return v[k]; }
  };
  using RowVector = Vector;
  using ColVector = Vector;

  struct Marks {
    uint8_t* v;
    __host__ __device__ Marks(Arena& arena, int64_t count) : v(arena.take<uint8_t>(count)) {}
    OTFACE_DEVICE bool get(Slot slot) const { return v[slot.i] != 0; }
    OTFACE_DEVICE void set(Slot slot, bool value) const { v[slot.i] = value ? 1 : 0; }
  };
  using RowMarks = Marks;
  using ColMarks = Marks;

  __host__ __device__ static int64_t row_count(int64_t n) { return n; }
  __host__ __device__ static int64_t col_count(int64_t m) { return m; }
  __host__ __device__ static int64_t padded(int64_t m) { return (m + pack - 1) / pack * pack; }

  // The team's memory.
  struct Layout {
    T* K;                // [n, ld]
    T* partial;          // [stripes, ld]
    double* in_double;   // [2, stripes, ld], gang only
    double* chunk_sums;  // [2, chunks, kMostSums], gang only: see sum_of
    int chunks = 0;

    __host__ __device__ Layout(Arena& arena, int64_t n, int64_t m, int threads) {
      const int64_t ld = padded(m);
      const int64_t stripes = most_stripes(Gang, n);
      K = arena.take<T>(n * ld);
      partial = arena.take<T>(stripes * ld);
      in_double = Gang ? arena.take<double>(2 * stripes * ld) : nullptr;
      chunks = static_cast<int>(((n > m ? n : m) + threads - 1) / threads);
      chunk_sums = Gang ? arena.take<double>(2 * static_cast<int64_t>(chunks) * kMostSums) : nullptr;
    }
  };

  // In shared memory, one per block.
  struct Scratch {
    double sums[kMostWarps][kMostSums];
    T of_warp[2][kMostWarps][kRowsAtATime];
    T columns[kMostWarps][32];
  };

  // What a block of a gang has asked for of K and not yet worked on: kStages times four rows. Each thread has its own columns.
  struct Ring {
    T* k = nullptr;  // [kStages, kRowsAtATime, packs, threads, pack]; null where there is none

    static constexpr int64_t entries(int threads) {
      return int64_t{kStages} * kRowsAtATime * kColumnsPerThread * threads;
    }
    OTFACE_DEVICE T* pack_of(int stage, int q, int p, int threads, int thread) const {
      return k + (((stage * kRowsAtATime + q) * packs + p) * threads + thread) * pack;
    }
  };

  // Where the blocks of a gang meet; null for a team of one block. Zero before the launch.
  struct Meeting {
    unsigned arrived;
    int bad[3];
    int unused[28];  // a cache line of its own
  };

  OTFACE_DEVICE MemoryMatrix(const Problem& problem, const Layout& layout, Scratch* scratch, Ring ring,
                             Meeting* meeting, int block_in_gang, int gang_blocks)
      : p_(problem),
        layout_(layout),
        scratch_(scratch),
        ring_(ring),
        meeting_(meeting),
        block_(block_in_gang),
        blocks_(gang_blocks),
        thread_(simt::thread_index()),
        threads_(simt::block_threads()) {}

  OTFACE_DEVICE bool is_first_here() const { return thread_ == 0; }  // of the team in this block
  OTFACE_DEVICE int thread_in_team() const { return block_ * threads_ + thread_; }
  OTFACE_DEVICE int team_threads() const { return blocks_ * threads_; }

  OTFACE_DEVICE void read_cost(const Problems& all) {
    view_ = &all.cost;
    start_ = p_.index * all.cost.batch_stride;
    ld_ = padded(p_.cols);
    stripe_rows_ = rows_per_stripe(Gang, p_.rows);
    stripes_ = (p_.rows + stripe_rows_ - 1) / stripe_rows_;
  }

  OTFACE_DEVICE T cost(int i, int j) const {
    return load_as<T>(view_->data, view_->dtype, start_ + i * view_->row_stride + j * view_->col_stride);
  }

  // --- the team ---

  OTFACE_DEVICE void sync(simt::Where where = simt::Where::current()) {
    if constexpr (Gang) {
      simt::gang_barrier(&meeting_->arrived, static_cast<unsigned>(blocks_), where);
    } else {
      simt::sync_block(where);
    }
  }
  // Sums of a sweep are handed out by whoever formed them, so that who owns a row must have read its entry before; but then
  // there is always a barrier between that and the owner, and all the rest of a row or column is its owner's alone.
  OTFACE_DEVICE void sync_in_memory(simt::Where where = simt::Where::current()) { sync(where); }
  OTFACE_DEVICE void sync_in_registers() const {}
  OTFACE_DEVICE bool any_in_domain(bool x) const { return x; }  // the domain is the team, whose threads agree
  OTFACE_DEVICE bool all(bool x) {
    if constexpr (!Gang) return !simt::any_in_block(!x);
    // Three flags in turn: one is set and read, while the next one, which nobody reads any more, is cleared.
    const int next = (round_ + 1) % 3;
    if (simt::any_in_warp(!x) && thread_ % 32 == 0) simt::mark(&meeting_->bad[round_]);
    if (thread_ == 0 && block_ == 0) meeting_->bad[next] = 0;
    sync();
    const bool result = meeting_->bad[round_] == 0;
    round_ = next;
    return result;
  }

  template <class F>
  OTFACE_DEVICE void rows(F f) const {
    if (!owns()) return;
    for (int i = thread_in_team(); i < p_.rows; i += owners()) f(Slot{i, i, true, true});
  }
  template <class F>
  OTFACE_DEVICE void cols(F f) const {
    if (!owns()) return;
    for (int j = thread_in_team(); j < p_.cols; j += owners()) f(Slot{j, j, true, true});
  }
  template <int N, class F>
  OTFACE_DEVICE void sum_rows(double (&sums)[N], F add) {
    sum_of(p_.rows, sums, add);
  }
  template <int N, class F>
  OTFACE_DEVICE void sum_cols(double (&sums)[N], F add) {
    sum_of(p_.cols, sums, add);
  }

  OTFACE_DEVICE static void replace(Vector& x, Vector& y, bool mask) {
    if (!mask) return;
    T* other = x.v;
    x.v = y.v;
    y.v = other;
  }

  // --- K --- (what each does is said in register_matrix.cuh)

  template <class Weigh, class Settle>
  OTFACE_DEVICE bool sweep(const Vector& x, const Marks& marked_rows, Weigh weigh, const Marks& marked_cols,
                           Settle settle) {
    return sweep_from(
        x, [&](int i) { return static_cast<T>(marked_rows.v[i]); }, weigh,
        [&](Slot col, T sum, bool& ok) { settle(col, sum + static_cast<T>(marked_cols.v[col.i]), ok); });
  }
  template <class Weigh, class Settle>
  OTFACE_DEVICE bool sweep(const Vector& x, Weigh weigh, Settle settle) {
    return sweep_from(x, [](int) { return T(0); }, weigh, settle);
  }

  OTFACE_DEVICE bool update_f(const double* g, const T* a, const T* b, double* f, Marks& empty, bool) {
    bool ok = true;
    for_rows_of_stripes([&](int i) {
      double least = kInfinity;
      for (int j = thread_in_unit(); j < p_.cols; j += unit_threads()) {
        const T c = cost(i, j);
        ok = ok && c > static_cast<T>(-kInfinity);
        if (b[j] > 0) least = least_of(static_cast<double>(c) - g[j], least);
      }
      least = unit_reduce(least, [](double x, double y) { return least_of(x, y); });
      const bool is_empty = !(least < kInfinity);
      T sum = 0;
      if (!is_empty)
        for (int j = thread_in_unit(); j < p_.cols; j += unit_threads())
          sum +=
              b[j] * capped_exp2(static_cast<T>((least - (static_cast<double>(cost(i, j)) - g[j])) * p_.to_exponent));
      sum = unit_reduce(sum, [](T x, T y) { return x + y; });
      ok = ok && (is_empty ? !(a[i] > 0) : sum >= Band<T>::least_normal);
      if (thread_in_unit() != 0) return;
      empty.set(Slot{i, i, true, true}, is_empty);
      f[i] = is_empty ? 0.0 : least - p_.eps * simt::log_of(static_cast<double>(sum));
    });
    return all(ok);
  }

  OTFACE_DEVICE bool update_g(const double* f, const T* a, const T* b, double* g, Marks& empty, bool) {
    const auto least_in = [&](int begin, int end, int j) {
      double least = kInfinity;
      for (int i = begin; i < end; ++i)
        if (a[i] > 0) least = least_of(static_cast<double>(cost(i, j)) - f[i], least);
      return least;
    };
    const auto sum_in = [&](int begin, int end, int j) {
      double sum = 0;
      for (int i = begin; i < end; ++i) {
        const double difference = g[j] - (static_cast<double>(cost(i, j)) - f[i]);
        if (difference > -kInfinity)
          sum += static_cast<double>(a[i] * capped_exp2(static_cast<T>(difference * p_.to_exponent)));
      }
      return sum;
    };
    bool ok = true;
    over_columns(0, least_in);
    sync_gang();
    cols(
        [&](Slot col) { g[col.i] = of_column(0, least_in, [](double x, double y) { return least_of(x, y); }, col.i); });
    sync_gang();
    over_columns(1, sum_in);
    sync_gang();
    cols([&](Slot col) {
      const double sum = of_column(1, sum_in, [](double x, double y) { return x + y; }, col.i);
      const bool is_empty = !(g[col.i] < kInfinity);
      ok = ok && (is_empty ? !(b[col.i] > 0) : sum >= static_cast<double>(Band<T>::least_normal));
      empty.set(col, is_empty);
      g[col.i] = is_empty ? 0.0 : g[col.i] - p_.eps * simt::log_of(sum);
    });
    return all(ok);
  }

  OTFACE_DEVICE void fill(const double* f, const double* g) {
    const T scale = static_cast<T>(least_of(p_.to_exponent, static_cast<double>(LargestOf<T>::value)));
    for_rows_of_stripes([&](int i) {
      T* row = layout_.K + static_cast<int64_t>(i) * ld_;
      T f_high, f_low, g_high, g_low;
      split(f[i], f_high, f_low);
      for (int j = thread_in_unit(); j < ld_; j += unit_threads()) {
        T entry = 0;
        if (j < p_.cols) {
          split(g[j], g_high, g_low);
          entry = capped_exp2(exact_difference(f_high, f_low, g_high, g_low, cost(i, j)) * scale);
        }
        row[j] = entry;
      }
    });
  }

  // Entries are visited twice where columns are summed as well: `writes` is true the first time only.
  template <int NR, int NC, class Entry, class Row, class Col>
  OTFACE_DEVICE void reduce_entries(Entry entry, Row row, Col col) {
    for_rows_of_stripes([&](int i) {
      T by_row[NR > 0 ? NR : 1] = {}, by_col[NC > 0 ? NC : 1] = {};
      for (int j = thread_in_unit(); j < p_.cols; j += unit_threads())
        entry(i, j, layout_.K[static_cast<int64_t>(i) * ld_ + j], by_row, by_col, true);
      T sums[NR > 0 ? NR : 1];
      for (int k = 0; k < NR; ++k) sums[k] = unit_reduce(by_row[k], [](T x, T y) { return x + y; });
      row(Slot{i, i, thread_in_unit() == 0, thread_in_unit() == 0}, sums);
    });
    if constexpr (NC > 0) {
      const auto add = [](double x, double y) { return x + y; };
      const auto sum_in = [&](int which) {
        return [&entry, this, which](int begin, int end, int j) {
          double sum = 0;
          for (int i = begin; i < end; ++i) {
            T by_row[NR > 0 ? NR : 1] = {}, by_col[NC] = {};
            entry(i, j, layout_.K[static_cast<int64_t>(i) * ld_ + j], by_row, by_col, false);
            sum += static_cast<double>(by_col[which]);
          }
          return sum;
        };
      };
      for (int k = 0; k < NC; ++k) over_columns(k, sum_in(k));
      sync_gang();
      cols([&](Slot slot) {
        T sums[NC];
        for (int k = 0; k < NC; ++k) sums[k] = static_cast<T>(of_column(k, sum_in(k), add, slot.i));
        col(slot, sums);
      });
    }
    sync();
  }

  // The factors of up to `most` outer products, until they are multiplied out together.
  struct OuterProducts {
    static constexpr int most = Gang ? 32 : 8;
    T* left;   // [most, n]
    T* right;  // [most, m]
    int64_t n, m;
    int terms = 0;
    __host__ __device__ OuterProducts(Arena& arena, int64_t rows, int64_t cols)
        : left(arena.take<T>(most * rows)), right(arena.take<T>(most * cols)), n(rows), m(cols) {}
  };
  OTFACE_DEVICE void clear(OuterProducts& products) const { products.terms = 0; }
  OTFACE_DEVICE void add_product(OuterProducts& products, const Vector& left, const Vector& right, T* out, int64_t ld) {
    if (out == nullptr) return;
    rows([&](Slot row) { products.left[products.terms * products.n + row.i] = left[row.i]; });
    cols([&](Slot col) { products.right[products.terms * products.m + col.i] = right[col.i]; });
    if (++products.terms == OuterProducts::most) flush(products, out, ld);
  }
  OTFACE_DEVICE void flush(OuterProducts& products, T* out, int64_t ld) {
    if (products.terms == 0) return;
    sync();
    for (int stripe = unit(); stripe < stripes_; stripe += units()) {
      const int end = stripe_end(stripe);
      for (int i = stripe * stripe_rows_; i < end; i += kRowsAtATime) {
        for (int j = thread_in_unit(); j < p_.cols; j += unit_threads()) {
          T sums[kRowsAtATime] = {};
          for (int t = 0; t < products.terms; ++t) {
            const T right = products.right[t * products.m + j];
            OTFACE_UNROLL
            for (int q = 0; q < kRowsAtATime; ++q)
              if (i + q < end) sums[q] += products.left[t * products.n + i + q] * right;
          }
          OTFACE_UNROLL
          for (int q = 0; q < kRowsAtATime; ++q)
            if (i + q < end) out[(i + q) * ld + j] += layout_.K[static_cast<int64_t>(i + q) * ld_ + j] * sums[q];
        }
      }
    }
    products.terms = 0;
  }

 private:
  OTFACE_DEVICE bool owns() const { return Gang || thread_ < kOwners; }
  OTFACE_DEVICE int owners() const { return Gang ? team_threads() : kOwners; }
  OTFACE_DEVICE int unit() const { return Gang ? block_ : thread_ / 32; }
  OTFACE_DEVICE int units() const { return Gang ? blocks_ : threads_ / 32; }
  OTFACE_DEVICE int thread_in_unit() const { return Gang ? thread_ : thread_ % 32; }
  OTFACE_DEVICE int unit_threads() const { return Gang ? threads_ : 32; }
  OTFACE_DEVICE int stripe_end(int stripe) const {
    return least_of((stripe + 1) * stripe_rows_, p_.rows);  // no overflow: rows < 2^31 - 512
  }

  // f(i) for the rows of this unit, by all of its threads.
  template <class F>
  OTFACE_DEVICE void for_rows_of_stripes(F f) const {
    for (int stripe = unit(); stripe < stripes_; stripe += units())
      for (int i = stripe * stripe_rows_; i < stripe_end(stripe); ++i) f(i);
  }

  using Offset = std::conditional_t<Gang, int64_t, int>;  // in K
  struct Rows {
    T k[kRowsAtATime][packs][pack];
  };

  // Where the rows that a thread loads begin, and its columns in them: never outside K, so that nothing need be asked. Beyond
  // the last row or column it is that one again; there x, and what the row weighs, are zero.
  OTFACE_DEVICE Offset start_of_row(int i, int end) const {
    return static_cast<Offset>(least_of(i, end > 0 ? end - 1 : 0)) * static_cast<Offset>(ld_);
  }
  OTFACE_DEVICE int column(int p, int first) const {
    return least_of(first + (p * unit_threads() + thread_in_unit()) * pack, static_cast<int>(ld_) - pack);
  }
  OTFACE_DEVICE bool is_column(int p, int first) const {
    return first + (p * unit_threads() + thread_in_unit()) * pack < ld_;
  }

  // Rows i .. i + 3, this thread's columns of the panel that begins at `first`. From global memory nothing is read twice, so
  // that there zeros stand for what is outside.
  OTFACE_DEVICE void load(Rows& out, int i, int end, int first) const {
    OTFACE_UNROLL
    for (int q = 0; q < kRowsAtATime; ++q) {
      const T* row = layout_.K + start_of_row(i + q, end);
      OTFACE_UNROLL
      for (int p = 0; p < packs; ++p) {
        simt::Pack<T> k{};
        if (!Gang || (i + q < end && is_column(p, first))) k = simt::load_pack(row + column(p, first));
        OTFACE_UNROLL
        for (int v = 0; v < pack; ++v) out.k[q][p][v] = k.v[v];
      }
    }
  }
  OTFACE_DEVICE void load_x(const Vector& x, int first, T (&out)[packs][pack]) const {
    OTFACE_UNROLL
    for (int p = 0; p < packs; ++p) {
      OTFACE_UNROLL
      for (int v = 0; v < pack; ++v) {
        const int j = first + (p * unit_threads() + thread_in_unit()) * pack + v;
        out[p][v] = j < p_.cols ? x[j] : T(0);
      }
    }
  }
  OTFACE_DEVICE void multiply(const Rows& rows, const T (&x)[packs][pack], T (&y)[kRowsAtATime]) const {
    OTFACE_UNROLL
    for (int p = 0; p < packs; ++p) {
      OTFACE_UNROLL
      for (int v = 0; v < pack; ++v) {
        OTFACE_UNROLL
        for (int q = 0; q < kRowsAtATime; ++q) y[q] += rows.k[q][p][v] * x[p][v];
      }
    }
  }
  OTFACE_DEVICE void add_weighted(const Rows& rows, const T (&w)[kRowsAtATime], T (&s)[packs][pack]) const {
    OTFACE_UNROLL
    for (int q = 0; q < kRowsAtATime; ++q) {
      OTFACE_UNROLL
      for (int p = 0; p < packs; ++p) {
        OTFACE_UNROLL
        for (int v = 0; v < pack; ++v) s[p][v] += w[q] * rows.k[q][p][v];
      }
    }
  }
  // From the sums of four rows over this thread's columns to what the rows weigh. A thread weighs one of the four, and learns
  // of the others. What is added to the sum, row_start(i), is asked for before the unit waits for its threads.
  template <class RowStart, class Weigh>
  OTFACE_DEVICE void weigh_rows(int i, int end, RowStart row_start, Weigh weigh, T (&y)[kRowsAtATime], bool& ok) {
    const int own = i + thread_ % 32 / kLanesPerRow;
    const bool inside = own < end, first = inside && thread_in_unit() % kLanesPerRow == 0 && thread_in_unit() < 32;
    const T start = inside ? row_start(own) : T(0);
    const T sum = unit_sum(y);
    const T weighed = inside ? weigh(Slot{own, own, first, first}, sum + start, ok) : T(0);
    OTFACE_UNROLL
    for (int q = 0; q < kRowsAtATime; ++q) y[q] = simt::shuffle(weighed, kLanesPerRow * q);
  }
  OTFACE_DEVICE void store_sums(T* out, int first, const T (&s)[packs][pack]) const {
    OTFACE_UNROLL
    for (int p = 0; p < packs; ++p) {
      const int j = first + (p * unit_threads() + thread_in_unit()) * pack;
      simt::Pack<T> sums;
      OTFACE_UNROLL
      for (int v = 0; v < pack; ++v) sums.v[v] = s[p][v];
      if (j < ld_) simt::store_pack(out + j, sums);
    }
  }

  // row_start(i): what the sum of row i begins with.
  template <class RowStart, class Weigh, class Settle>
  OTFACE_DEVICE bool sweep_from(const Vector& x, RowStart row_start, Weigh weigh, Settle settle) {
    bool ok = true;
    if (Gang && sizeof(T) == 4 && ring_.k != nullptr) {
      if constexpr (Gang && sizeof(T) == 4) sweep_stripes_in_ring(x, row_start, weigh, ok);
    } else if (ld_ <= kColumnsPerThread * unit_threads()) {
      sweep_stripes(x, row_start, weigh, ok);
    } else {
      for (int stripe = unit(); stripe < stripes_; stripe += units())
        sweep_wide_stripe(stripe, x, row_start, weigh, ok);
    }
    sync();
    if constexpr (Gang) {
      settle_columns_of_gang(settle, ok);
    } else {
      cols([&](Slot col) {
        T sum = layout_.partial[col.i];
        for (int stripe = 1; stripe < stripes_; ++stripe) sum += layout_.partial[stripe * ld_ + col.i];
        settle(col, sum, ok);
      });
    }
    return all(ok);
  }

  // Four rows of a stripe. The first ones of a stripe follow the last ones of the stripe before, so that they too are on their
  // way while the unit is at work.
  struct Step {
    int stripe, i, end;  // nothing is left where end == 0
  };
  OTFACE_DEVICE Step first_step(int stripe) const {
    return {stripe, stripe * stripe_rows_, stripe < stripes_ ? stripe_end(stripe) : 0};
  }
  OTFACE_DEVICE Step after(const Step& step) const {
    const int i = step.i + kRowsAtATime;
    return i < step.end ? Step{step.stripe, i, step.end} : first_step(step.stripe + units());
  }

  // All stripes of this unit, of rows that its threads can hold in registers.
  template <class RowStart, class Weigh>
  OTFACE_DEVICE void sweep_stripes(const Vector& x, RowStart row_start, Weigh weigh, bool& ok) {
    T x_own[packs][pack], s[packs][pack] = {};
    load_x(x, 0, x_own);
    Step step = first_step(unit());
    Rows rows;
    load(rows, step.i, step.end, 0);
    while (step.end > 0) {
      const Step next = after(step);
      T y[kRowsAtATime] = {};
      multiply(rows, x_own, y);
      weigh_rows(step.i, step.end, row_start, weigh, y, ok);
      add_weighted(rows, y, s);
      load(rows, next.i, next.end, 0);
      store_at_end_of_stripe(step, next, s);
      step = next;
    }
  }

  // The same through `Ring`: the next kStages - 1 steps are on their way, also while the unit waits for its barrier.
  template <class RowStart, class Weigh>
  OTFACE_DEVICE void sweep_stripes_in_ring(const Vector& x, RowStart row_start, Weigh weigh, bool& ok) {
    T x_own[packs][pack], s[packs][pack] = {};
    Step step = first_step(unit()), ahead = step;
    OTFACE_UNROLL
    for (int stage = 0; stage < kStages; ++stage) {
      ask_for(stage, ahead);
      ahead = after(ahead);
    }
    load_x(x, 0, x_own);
    for (int stage = 0; step.end > 0; stage = stage + 1 < kStages ? stage + 1 : 0) {
      simt::wait_for_copies<kStages - 1>();
      Rows rows;
      OTFACE_UNROLL
      for (int q = 0; q < kRowsAtATime; ++q) {
        OTFACE_UNROLL
        for (int p = 0; p < packs; ++p) {
          simt::Pack<T> k{};
          if (is_column(p, 0)) k = simt::load_pack(ring_.pack_of(stage, q, p, threads_, thread_));
          OTFACE_UNROLL
          for (int v = 0; v < pack; ++v) rows.k[q][p][v] = k.v[v];
        }
      }
      T y[kRowsAtATime] = {};
      multiply(rows, x_own, y);
      ask_for(stage, ahead);  // what stood there is in registers
      ahead = after(ahead);
      weigh_rows(step.i, step.end, row_start, weigh, y, ok);
      add_weighted(rows, y, s);
      const Step next = after(step);
      store_at_end_of_stripe(step, next, s);
      step = next;
    }
    simt::wait_for_copies<0>();  // of what is not needed, before the next sweep asks for something else there
  }
  OTFACE_DEVICE void ask_for(int stage, const Step& step) const {
    OTFACE_UNROLL
    for (int q = 0; q < kRowsAtATime; ++q) {
      const T* row = layout_.K + start_of_row(step.i + q, step.end);
      OTFACE_UNROLL
      for (int p = 0; p < packs; ++p) {
        if (step.end > 0 && is_column(p, 0))
          simt::start_copy(ring_.pack_of(stage, q, p, threads_, thread_), row + column(p, 0));
      }
    }
    simt::end_of_copies();
  }
  OTFACE_DEVICE void store_at_end_of_stripe(const Step& step, const Step& next, T (&s)[packs][pack]) const {
    if (next.end > 0 && next.stripe == step.stripe) return;
    store_sums(layout_.partial + step.stripe * ld_, 0, s);
    OTFACE_UNROLL
    for (int p = 0; p < packs; ++p) {
      OTFACE_UNROLL
      for (int v = 0; v < pack; ++v) s[p][v] = 0;
    }
  }

  template <class RowStart, class Weigh>
  OTFACE_DEVICE void sweep_wide_stripe(int stripe, const Vector& x, RowStart row_start, Weigh weigh, bool& ok) {
    const int end = stripe_end(stripe), panel = kColumnsPerThread * unit_threads();
    T* sums = layout_.partial + stripe * ld_;
    for (int i = stripe * stripe_rows_; i < end; i += kRowsAtATime) {
      T y[kRowsAtATime] = {};
      Rows rows;
      T x_own[packs][pack];
      for (int first = 0; first < ld_; first += panel) {
        load(rows, i, end, first);
        load_x(x, first, x_own);
        multiply(rows, x_own, y);
      }
      weigh_rows(i, end, row_start, weigh, y, ok);
      for (int first = 0; first < ld_; first += panel) {
        T s[packs][pack] = {};
        if (i > stripe * stripe_rows_) {
          OTFACE_UNROLL
          for (int p = 0; p < packs; ++p) {
            const int j = first + (p * unit_threads() + thread_in_unit()) * pack;
            simt::Pack<T> before{};
            if (j < ld_) before = simt::load_pack(sums + j);
            OTFACE_UNROLL
            for (int v = 0; v < pack; ++v) s[p][v] = before.v[v];
          }
        }
        load(rows, i, end, first);
        add_weighted(rows, y, s);
        store_sums(sums, first, s);
      }
    }
  }

  // A block of a gang takes 32 columns at a time; its warps share the stripes.
  template <class Settle>
  OTFACE_DEVICE void settle_columns_of_gang(Settle settle, bool& ok) {
    const int warp = thread_ / 32, warps = threads_ / 32, lane = thread_ % 32;
    for (int first = block_ * 32; first < p_.cols; first += blocks_ * 32) {
      const int j = first + lane;
      T sum = 0;
      if (j < p_.cols) {
        OTFACE_UNROLL_BY_8
        for (int stripe = warp; stripe < stripes_; stripe += warps) sum += layout_.partial[stripe * ld_ + j];
      }
      scratch_->columns[warp][lane] = sum;
      simt::sync_block();
      if (warp == 0 && j < p_.cols) {
        for (int k = 1; k < warps; ++k) sum += scratch_->columns[k][lane];
        settle(Slot{j, j, true, true}, sum, ok);
      }
      simt::sync_block();
    }
  }

  // The sums over the unit of four values per thread. A thread learns one of them, that of y[lane / 8]. Halving what is
  // exchanged in each step, four sums take 6 shuffles.
  OTFACE_DEVICE T unit_sum(const T (&y)[kRowsAtATime]) {
    const int lane = thread_ % 32;
    const bool upper = (lane & 16) != 0, odd = (lane & 8) != 0;
    const T kept[2] = {upper ? y[2] : y[0], upper ? y[3] : y[1]};
    const T given[2] = {upper ? y[0] : y[2], upper ? y[1] : y[3]};
    const T sum0 = kept[0] + simt::shuffle_xor(given[0], 16), sum1 = kept[1] + simt::shuffle_xor(given[1], 16);
    T sum = (odd ? sum1 : sum0) + simt::shuffle_xor(odd ? sum0 : sum1, 8);
    OTFACE_UNROLL
    for (int bit = kLanesPerRow / 2; bit > 0; bit /= 2) sum += simt::shuffle_xor(sum, bit);
    if constexpr (Gang) {
      // Two buffers in turn: a thread that writes one has passed the barrier after which nobody reads it any more.
      auto& buffer = scratch_->of_warp[turn_];
      turn_ ^= 1;
      const int row = lane / kLanesPerRow;
      if (lane % kLanesPerRow == 0) buffer[thread_ / 32][row] = sum;
      simt::sync_block();
      sum = buffer[0][row];
      OTFACE_UNROLL_BY_4
      for (int warp = 1; warp < threads_ / 32; ++warp) sum += buffer[warp][row];
    }
    return sum;
  }

  // One value per thread, combined over the unit; the same in all of its threads.
  template <class U, class Op>
  OTFACE_DEVICE U unit_reduce(U x, Op op) {
    OTFACE_UNROLL
    for (int bit = 16; bit > 0; bit /= 2) x = op(x, simt::shuffle_xor(x, bit));
    if constexpr (!Gang) return x;
    if (thread_ % 32 == 0) scratch_->sums[thread_ / 32][0] = static_cast<double>(x);
    simt::sync_block();
    x = static_cast<U>(scratch_->sums[0][0]);
    for (int warp = 1; warp < threads_ / 32; ++warp) x = op(x, static_cast<U>(scratch_->sums[warp][0]));
    simt::sync_block();
    return x;
  }

  // add(slot, sums) for each of `count` entries, summed in an order that depends on nothing but `count` and the size of a
  // block: chunks of one entry per thread, then the chunks.
  template <int N, class F>
  OTFACE_DEVICE void sum_of(int count, double (&sums)[N], F add) {
    static_assert(N <= kMostSums);
    for (int c = 0; c < N; ++c) sums[c] = 0;
    if constexpr (!Gang) {
      if (owns())
        for (int i = thread_; i < count; i += owners()) add(Slot{i, i, true, true}, sums);
      block_sum(sums);
      return;
    }
    // Two buffers in turn, as in unit_sum.
    double* of_chunks = layout_.chunk_sums + chunk_turn_ * static_cast<int64_t>(layout_.chunks) * kMostSums;
    chunk_turn_ ^= 1;
    const int chunks = (count + threads_ - 1) / threads_;
    for (int chunk = block_; chunk < chunks; chunk += blocks_) {
      double own[N] = {};
      const int i = chunk * threads_ + thread_;
      if (i < count) add(Slot{i, i, true, true}, own);
      block_sum(own);
      if (thread_ == 0)
        for (int c = 0; c < N; ++c) of_chunks[chunk * kMostSums + c] = own[c];
    }
    sync();
    for (int chunk = thread_; chunk < chunks; chunk += threads_)
      for (int c = 0; c < N; ++c) sums[c] += of_chunks[chunk * kMostSums + c];
    block_sum(sums);
  }
  template <int N>
  OTFACE_DEVICE void block_sum(double (&sums)[N]) {
    for (int c = 0; c < N; ++c) {
      OTFACE_UNROLL
      for (int bit = 16; bit > 0; bit /= 2) sums[c] += simt::shuffle_xor(sums[c], bit);
      if (thread_ % 32 == 0) scratch_->sums[thread_ / 32][c] = sums[c];
    }
    simt::sync_block();
    for (int c = 0; c < N; ++c) {
      sums[c] = scratch_->sums[0][c];
      for (int warp = 1; warp < threads_ / 32; ++warp) sums[c] += scratch_->sums[warp][c];
    }
    simt::sync_block();
  }

  // Where a block by itself has nobody to wait for: a thread has the whole of a column.
  OTFACE_DEVICE void sync_gang(simt::Where where = simt::Where::current()) {
    if constexpr (Gang) sync(where);
  }
  // part(begin, end, j): column j over some rows. In a gang, over each stripe first, into buffer `which`.
  template <class Part>
  OTFACE_DEVICE void over_columns(int which, Part part) {
    if constexpr (Gang) {
      double* buffer = layout_.in_double + which * static_cast<int64_t>(stripes_) * ld_;
      for (int stripe = block_; stripe < stripes_; stripe += blocks_)
        for (int j = thread_; j < p_.cols; j += threads_)
          buffer[stripe * ld_ + j] = part(stripe * stripe_rows_, stripe_end(stripe), j);
    }
  }
  template <class Part, class Op>
  OTFACE_DEVICE double of_column(int which, Part part, Op op, int j) const {
    if constexpr (!Gang) return part(0, p_.rows, j);
    const double* buffer = layout_.in_double + which * static_cast<int64_t>(stripes_) * ld_;
    double x = buffer[j];
    for (int stripe = 1; stripe < stripes_; ++stripe) x = op(x, buffer[stripe * ld_ + j]);
    return x;
  }

  const Problem& p_;
  const Layout& layout_;
  Scratch* scratch_;
  Ring ring_;
  Meeting* meeting_;
  int block_, blocks_, thread_, threads_;
  int round_ = 0, turn_ = 0, chunk_turn_ = 0;
  const CostView* view_ = nullptr;
  int64_t start_ = 0, ld_ = 0;
  int stripe_rows_ = 1, stripes_ = 1;
};

}  // namespace otface::sinkhorn
