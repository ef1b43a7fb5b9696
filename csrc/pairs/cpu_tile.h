// A tile of a matrix product: what all products of the pairs are made of.
// Part of the translation unit of one instruction set: include through cpu_kernels.h only.
//
// sum[r][c] += a[r][k] * b[k][c], with R rows and C vectors of columns in registers. Per k: C loads and R broadcasts for
// R * C multiply-adds, so that the loads do not limit: 12 of these for 8 loads with 16 registers, 24 for 10 with 32.
#pragma once

#include "common/vec.h"
#include "pairs/params.h"

namespace otface::pairs {
namespace {

// The baseline has no fused multiply-add, and needs registers for products.
constexpr int most_rows = OTFACE_VEC_BYTES == 16 ? 4 : 6, most_vectors = OTFACE_VEC_BYTES == 64 ? 4 : 2;

// Where vector c of a group begins. The vectors of a group lie in one panel, or fill several.
template <class T>
OTFACE_INLINE int64_t vector_at(int64_t c, int64_t panel_stride) {
  constexpr int64_t per_panel = panel / lanes<T>;
  return c / per_panel * panel_stride + c % per_panel * lanes<T>;
}

template <class T, int R, int C>
struct Tile {
  Vec<T> sum[R][C] = {};

  // a_rk at a + r * row + k * step, row k of b at b + k * panel; k < count.
  OTFACE_INLINE void add(int64_t count, const T* a, int64_t row, int64_t step, const T* b, int64_t panel_stride) {
    for (int64_t k = 0; k < count; ++k, a += step, b += panel) {
      Vec<T> b_v[C];
      OTFACE_UNROLL
      for (int c = 0; c < C; ++c) b_v[c] = load<Vec<T>>(b + vector_at<T>(c, panel_stride));
      OTFACE_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vec<T> a_v = broadcast<Vec<T>>(a[r * row]);
        OTFACE_UNROLL
        for (int c = 0; c < C; ++c) sum[r][c] += a_v * b_v[c];
      }
    }
  }

  // f(r, c, sum[r][c]) for all of them
  template <class F>
  OTFACE_INLINE void for_each(const F& f) const {
    OTFACE_UNROLL
    for (int r = 0; r < R; ++r) {
      OTFACE_UNROLL
      for (int c = 0; c < C; ++c) f(r, c, sum[r][c]);
    }
  }
};

template <int N>
struct Count {
  static constexpr int value = N;
};

// f(r, Count<R>{}) for stretches of rows r .. r + R - 1, as even as they can be.
template <class F>
OTFACE_INLINE void for_row_tiles(int64_t rows, const F& f) {
  const int64_t tiles = (rows + most_rows - 1) / most_rows;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = rows * t / tiles, height = rows * (t + 1) / tiles - begin;
    switch (height) {
      case 1: f(begin, Count<1>{}); break;
      case 2: f(begin, Count<2>{}); break;
      case 3: f(begin, Count<3>{}); break;
      case 4: f(begin, Count<4>{}); break;
      case 5: f(begin, Count<5>{}); break;
      case 6: f(begin, Count<6>{}); break;
    }
  }
}

// f(c, Count<C>{}) for groups of vectors c .. c + C - 1.
template <class F>
OTFACE_INLINE void for_vector_groups(int64_t vectors, const F& f) {
  int64_t c = 0;
  for (; c + most_vectors <= vectors; c += most_vectors) f(c, Count<most_vectors>{});
  switch (vectors - c) {
    case 1: f(c, Count<1>{}); break;
#if OTFACE_VEC_BYTES == 64
    case 2: f(c, Count<2>{}); break;
    case 3: f(c, Count<3>{}); break;
#endif
  }
}

}  // namespace
}  // namespace otface::pairs
