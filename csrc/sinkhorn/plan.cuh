// What is computed entry by entry from finished potentials: the plan, and the envelope gradient.
//
//   P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps)          d value / dC = P,  d value / da = f,  d value / db = g (centred)
//
// Threads: a warp per row, its lanes over the columns, blocks of 8 rows. Reads C once and writes P once, one exponential
// per entry.
#pragma once

#include "sinkhorn/team.cuh"

namespace otface::sinkhorn {

constexpr int kPlanThreads = 256;

// out = scale_k * P for problem k; NaN where the problem has no solution, 0 in the padding.
template <class T>
__global__ void __launch_bounds__(kPlanThreads)
    write_plan(const __grid_constant__ Problems all, const double* potentials,  // [B, n + m]
               const T* scale,                                                  // [B], or null: 1
               T* out) {                                                        // [B, n, m]
  const int64_t row = simt::block_index() * (kPlanThreads / 32) + simt::thread_index() / 32;
  if (row >= all.batch * all.n) return;
  const int64_t index = row / all.n;
  const int i = static_cast<int>(row - index * all.n);
  Problem p;
  p.read(all, index);
  const double* f = potentials + index * (all.n + all.m);
  const double* g = f + all.n;
  T* out_row = out + row * all.m;
  const bool solved = p.valid && is_finite(f[0]);
  const T a = (scale == nullptr ? T(1) : scale[index]) * read_weight<T>(all, all.a, index, i, p.rows);
  const int64_t start = index * all.cost.batch_stride + i * all.cost.row_stride;
  for (int j = simt::thread_index() % 32; j < all.m; j += 32) {
    T x = 0;
    if (i < p.rows && j < p.cols) {
      const T c = load_as<T>(all.cost.data, all.cost.dtype, start + j * all.cost.col_stride);
      const double difference = (f[i] + g[j]) - static_cast<double>(c);
      const T e = capped_exp2(static_cast<T>(difference * p.to_exponent));
      x = solved ? e * read_weight<T>(all, all.b, index, j, p.cols) * a : static_cast<T>(kNaN);
    }
    out_row[j] = x;
  }
}

// out = scale_k * potential, centred by its mean over the valid entries. A warp per problem.
template <class T>
__global__ void __launch_bounds__(kPlanThreads)
    write_centred_potentials(const __grid_constant__ Problems all, const double* potentials,  // [B, n + m]
                             const T* scale,                                                  // [B]
                             bool of_rows,
                             T* out) {  // [B, n] or [B, m]
  const int64_t index = simt::block_index() * (kPlanThreads / 32) + simt::thread_index() / 32;
  const int lane = simt::thread_index() % 32;
  Problem p;
  p.read(all, index);
  const int64_t size = of_rows ? all.n : all.m;
  const int count = of_rows ? p.rows : p.cols;
  const double* x = potentials + p.index * (all.n + all.m) + (of_rows ? 0 : all.n);
  double sum = 0;
  for (int i = lane; i < count; i += 32) sum += x[i];
  OTFACE_UNROLL
  for (int bit = 16; bit > 0; bit /= 2) sum += simt::shuffle_xor(sum, bit);
  if (!p.exists) return;
  const double mean = p.valid ? sum / count : kNaN, times = static_cast<double>(scale[index]);
  for (int64_t i = lane; i < size; i += 32)
    out[index * size + i] = i < count ? static_cast<T>(times * (x[i] - mean)) : T(0);
}

template <class T>
const char* launch_plan(const Problems& all, const double* potentials, const void* scale, void* out,
                        simt::Stream stream) {
  const int64_t rows_per_block = kPlanThreads / 32, blocks = (all.batch * all.n + rows_per_block - 1) / rows_per_block;
  return simt::launch(write_plan<T>, {blocks, kPlanThreads, 0}, stream, all, potentials, static_cast<const T*>(scale),
                      static_cast<T*>(out));
}

template <class T>
const char* launch_envelope(const BackwardParams& params, simt::Stream stream) {
  const Problems& all = params.problems;
  const int64_t blocks = (all.batch + kPlanThreads / 32 - 1) / (kPlanThreads / 32);
  for (const bool of_rows : {true, false}) {
    void* out = of_rows ? params.grad_a : params.grad_b;
    if (out == nullptr) continue;
    const char* error =
        simt::launch(write_centred_potentials<T>, {blocks, kPlanThreads, 0}, stream, all, params.potentials,
                     static_cast<const T*>(params.grad_value), of_rows, static_cast<T*>(out));
    if (*error != 0) return error;
  }
  if (params.grad_cost == nullptr) return "";
  return launch_plan<T>(all, params.potentials, params.grad_value, params.grad_cost, stream);
}

}  // namespace otface::sinkhorn
