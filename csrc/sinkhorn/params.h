// What the operators of the Sinkhorn family take: plain structs of raw pointers, the same for every device.
//
// For each problem of the batch, cost C (n x m), weights a, b >= 0 of equal total mass W > 0, eps > 0:
//
//   f_i <- -eps * log sum_j b_j exp((g_j - C_ij) / eps),   then   g_j <- -eps * log sum_i a_i exp((f_i - C_ij) / eps)
//   P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)
//
// "Real" is the type of the arithmetic and of the results: double for a double cost, else float. Strides count elements.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace otface::sinkhorn {

struct CostView {
  const void* data;  // [B, n, m]
  DType dtype;
  int64_t batch_stride, row_stride, col_stride;
};

struct WeightsView {
  const void* data;  // [B, n] or [B, m], Real; null: uniform over the valid entries, total mass 1
  int64_t batch_stride, stride;
};

struct Problems {
  bool is_double;  // Real
  int64_t batch, n, m;
  CostView cost;
  WeightsView a, b;
  const double* eps;  // [B] or, with stride 0, [1]
  int64_t eps_stride;
  double mass_tolerance;  // where the masses of a and b differ by more, relative to the larger, there is no solution
  const int64_t* row_lengths;  // [B] or null: all n
  const int64_t* col_lengths;  // [B] or null: all m
};

// The history that the unrolled gradient reads: one slot of `slot` Reals per iteration, slot = m + max(n, m).
//   an ordinary iteration: the column sums s [m], then the row sums r [n] (see cpu_kernel_matrix.h)
//   a rebuilt one (`rebuilt` > 0; the first always is): the g it started from, as a high and a low part, [m] each
constexpr uint8_t kRowsRebuilt = 1, kRowsAndColumnsRebuilt = 2;  // the CPU finds out again which of the two it was
struct HistoryView {
  void* slots;       // [B, max_iter, slot] Real, or null
  uint8_t* rebuilt;  // [B, max_iter]
  int64_t max_iter, slot;
};

struct ForwardParams {
  Problems problems;
  const void* init_g;  // [B, m] Real, contiguous, or null: start from zero
  const double* tol;   // [B] or, with stride 0, [1]
  int64_t tol_stride;
  int64_t max_iter, check_every;
  void* value;           // [B] Real
  void* transport_cost;  // [B] Real
  void* f;               // [B, n] Real
  void* g;               // [B, m] Real
  void* plan;            // [B, n, m] Real, or null
  void* error;           // [B] Real
  int64_t* n_iter;       // [B]
  bool* converged;       // [B]
  double* potentials;    // [B, n + m]: f and g before rounding to Real, for the gradients
  HistoryView history;   // written unless null
};

struct BackwardParams {
  Problems problems;
  const double* potentials;         // [B, n + m]
  const void* grad_value;           // [B] Real, or null
  const void* grad_transport_cost;  // [B] Real, or null
  const void* grad_f;               // [B, n] Real, or null
  const void* grad_g;               // [B, m] Real, or null
  const void* grad_plan;            // [B, n, m] Real, or null
  const int64_t* n_iter;            // [B], unrolled only
  HistoryView history;              // unrolled only
  double tol;                       // implicit only: relative residual of the adjoint system
  int64_t max_iter;                 // implicit only: conjugate-gradient steps
  void* grad_cost;                  // [B, n, m] Real, or null
  void* grad_a;                     // [B, n] Real, or null
  void* grad_b;                     // [B, m] Real, or null
  bool* converged;                  // [B], implicit only
};

}  // namespace otface::sinkhorn
