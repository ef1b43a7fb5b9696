// One iteration in the log domain, which leaves K anew: the start of every solve, and what is done when the sums of an
// ordinary iteration leave the band. For any matrix of team.cuh.
//
//   f_i <- -eps log sum_j b_j exp((g_j - C_ij) / eps)        K_ij = exp((f_i + g_j - C_ij) / eps),   so that r = K b = 1
//   s = K^T a,   and, if s leaves the band:   g_j <- -eps log sum_i a_i exp((f_i - C_ij) / eps),   K again,   so that s = 1
//
// K is always computed from the potentials in one way (`fill`), so that a team which shares its warp with one that starts
// anew may compute its K again and gets the same bits. Costs two or four exponentials per entry.
#pragma once

#include "sinkhorn/team.cuh"

namespace otface::sinkhorn {

// The vectors that go with K through a solve and through its reverse.
template <class M>
struct State {
  using T = typename M::T;
  typename M::Layout matrix;
  T *a, *b;                         // [n], [m]
  double *f0, *g0;                  // [n], [m]: the potentials absorbed in K
  typename M::RowMarks empty_rows;  // without an allowed pair (and the padding): the row sum counts as 1
  typename M::ColMarks empty_cols;
  typename M::ColVector x;  // what the next sweep multiplies with

  __host__ __device__ State(Arena& arena, int64_t n, int64_t m, int threads)
      : matrix(arena, n, m, threads),
        a(arena.take<T>(M::row_count(n))),
        b(arena.take<T>(M::col_count(m))),
        f0(arena.take<double>(M::row_count(n))),
        g0(arena.take<double>(M::col_count(m))),
        empty_rows(arena, M::row_count(n)),
        empty_cols(arena, M::col_count(m)),
        x(arena, M::col_count(m)) {}
};

// The problem with its weights, masses and validity. Ends with everything visible to the team.
template <class M>
OTFACE_DEVICE void read_problem(M& matrix, State<M>& state, const Problems& all, Problem& p, int64_t index) {
  using T = typename M::T;
  if (matrix.is_first_here()) p.read(all, index);
  matrix.sync();
  matrix.read_cost(all);
  matrix.rows([&](Slot row) {
    state.empty_rows.set(row, row.i >= p.rows);
    if (row.counts) state.a[row.i] = read_weight<T>(all, all.a, p.index, row.i, p.rows);
  });
  matrix.cols([&](Slot col) {
    state.empty_cols.set(col, col.i >= p.cols);
    if (col.counts) state.b[col.i] = read_weight<T>(all, all.b, p.index, col.i, p.cols);
  });
  double of_a[3], of_b[3];  // the mass, how many are negative or NaN, how many are zero
  const auto add = [](T w, double* sums) {
    sums[0] += static_cast<double>(w);
    sums[1] += w >= 0 ? 0.0 : 1.0;
    sums[2] += w == 0 ? 1.0 : 0.0;
  };
  matrix.template sum_rows<3>(of_a, [&](Slot row, double* sums) {
    if (row.i < p.rows) add(state.a[row.i], sums);
  });
  matrix.template sum_cols<3>(of_b, [&](Slot col, double* sums) {
    if (col.i < p.cols) add(state.b[col.i], sums);
  });
  if (matrix.is_first_here()) {
    p.mass_a = of_a[0];
    p.mass_b = of_b[0];
    p.has_zero_in_b = of_b[2] > 0;
    // Unlike on the CPU nothing is scaled: an extreme mass or eps leads beyond the numbers of T.
    const double larger = p.mass_a > p.mass_b ? p.mass_a : p.mass_b;
    p.valid = p.valid && of_a[1] == 0 && of_b[1] == 0 && p.mass_a > 0 && p.mass_b > 0 && is_finite(p.mass_a) &&
              is_finite(p.mass_b) && fabs(p.mass_a - p.mass_b) <= all.mass_tolerance * larger &&
              larger >= Extremes<T>::least_mass && larger <= Extremes<T>::most_mass && p.eps >= Extremes<T>::least_eps;
  }
  matrix.sync();
}

struct Absorbed {
  bool ok;       // false: the problem has no solution
  bool columns;  // g was updated too
};

// From g in g0. The column sums go to `s` (teams in `mask` only); x is lost. wants_columns(in_band) decides about the second
// half. K may be used after the next sync().
template <class M, class Wants>
OTFACE_DEVICE Absorbed absorb(M& matrix, State<M>& state, typename M::ColVector& s, bool mask, Wants wants_columns) {
  using T = typename M::T;
  bool ok = matrix.update_f(state.g0, state.a, state.b, state.f0, state.empty_rows, mask);
  matrix.cols([&](Slot col) { state.x[col.k] = state.b[col.i]; });
  matrix.fill(state.f0, state.g0);
  matrix.sync();
  const bool in_band = matrix.sweep(
      state.x, state.empty_rows, [&](Slot row, T, bool&) { return state.a[row.i]; }, state.empty_cols,
      [&](Slot col, T sum, bool& fine) {
        fine = fine && within_band(sum);
        if (mask) s[col.k] = sum;
      });
  const bool columns = mask && ok && wants_columns(in_band);
  if (matrix.any_in_domain(columns)) {
    const bool columns_ok = matrix.update_g(state.f0, state.a, state.b, state.g0, state.empty_cols, columns);
    matrix.cols([&](Slot col) {
      if (columns) s[col.k] = 1;
    });
    matrix.fill(state.f0, state.g0);
    ok = ok && (columns_ok || !columns);
  }
  return {ok, columns};
}

}  // namespace otface::sinkhorn
