// The envelope gradient: d value / dC = P, d value / da = f, d value / db = g (both centred).
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// P is computed again from the potentials, one exponential per entry, so that the forward keeps no plan. Reads C once and
// writes its gradient once.
#pragma once

#include "sinkhorn/cpu_gradient.h"

namespace otface::sinkhorn {
namespace {

template <class T>
void envelope_backward(const BackwardParams& params, const Executor& executor) {
  const Problems& all = params.problems;
  for_each_worker<T>(all, executor, [&](Executor inner, const auto& next) {
    Problem<T> p;
    Buffer<double> scaled, g, difference, weights_gradient;
    Buffer<T> row;
    for (int64_t index = next(); index >= 0; index = next()) {
      p.read(all, index);
      const GradientViews<T> out(params, p);
      const double* f = scaled_potentials(p, params.potentials + index * (all.n + all.m), all.n + all.m, scaled);
      if (!(f[0] == f[0]) || !p.valid) {
        write_nan_gradients(all, p.rows, p.cols, out);
        continue;
      }
      g.resize(p.padded_cols);
      for (int64_t j = 0; j < p.padded_cols; ++j) g[j] = j < p.cols ? f[all.n + j] : 0.0;
      weights_gradient.resize(p.rows > p.cols ? p.rows : p.cols);
      for (int64_t i = 0; i < p.rows; ++i) weights_gradient[i] = out.value * f[i];
      write_weights_gradient(weights_gradient.data(), p.rows, all.n, true, out, out.a);
      for (int64_t j = 0; j < p.cols; ++j) weights_gradient[j] = out.value * g[j];
      write_weights_gradient(weights_gradient.data(), p.cols, all.m, true, out, out.b);
      if (out.cost == nullptr) continue;
      row.resize(p.blocks.count * p.padded_cols);
      difference.resize(p.blocks.count * p.padded_cols);
      run(inner, p.blocks.count, [&](int64_t block) {
        T* e = row + block * p.padded_cols;
        double* d = difference + block * p.padded_cols;
        const int64_t end = p.blocks.end(block, p.rows);
        for (int64_t i = p.blocks.begin(block); i < end; ++i) {
          p.cost.read(i, e);
          add_potentials(e, f[i] - p.extra_potential(), g.data(), p.padded_cols, d);
          exp_of(d, p.inverse_eps(), p.padded_cols, e);
          const T scale = static_cast<T>(out.value) * p.a[i];
          for (int64_t j = 0; j < p.padded_cols; ++j) e[j] = e[j] * p.b[j] * scale;
          out.finish_cost_row(e, p.cols);
          write_cost_row(e, p.cols, all.m, out.cost + i * all.m);
        }
      });
      clear_cost_rows(p.rows, all.n, all.m, out.cost);
    }
  });
}

}  // namespace
}  // namespace otface::sinkhorn
