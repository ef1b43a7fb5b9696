// The costs of listed pairs: C_k = 1 - U_i U_j^T; those of near points from their differences. Part of the translation
// unit of one instruction set: include through cpu_kernels.h only.
//
// Elements of U_i come from `rows`, vectors over the points of j from `columns`. The points of j that fill no panel take
// the part of i, so that only the panel that they do not fill is partly computed in vain. Per pair p^2 d multiply-adds.
// The vectors stay in the first-level cache while all rows of U_i pass. U_i stays in the second-level cache from pair to
// pair where the list is in order of i, so that a pair reads U_j, p d Reals, and writes p^2.
#pragma once

#include "common/cpu_buffer.h"
#include "common/cpu_run.h"
#include "pairs/cpu_difference.h"
#include "pairs/cpu_tile.h"

namespace otface::pairs {
namespace {

template <class T>
class PairCost {
 public:
  explicit PairCost(const CostParams& params)
      : points_(params.shape.points),
        depth_(depth_of(params.shape.size)),
        share_(static_cast<T>(near_share(params.shape.size))),
        rows_(static_cast<const T*>(params.rows)),
        columns_(static_cast<const T*>(params.columns)),
        cost_(static_cast<T*>(params.cost)) {
    rest_.resize(panel * width());
  }

  // For points [begin, end) of i, and all of j; with the first of them also what the last points of j need.
  void compute(int64_t k, int64_t i, int64_t j, int64_t begin, int64_t end) {
    const int64_t whole = points_ / panel * panel, rest = points_ - whole;
    T* out = cost_ + k * points_ * points_;
    multiply(rows_of(i) + begin * panel, end - begin, columns_of(j), whole, out + begin * points_, points_);
    replace_near(i, j, begin, end, 0, whole, out);
    if (begin > 0 || rest == 0) return;
    multiply(rows_of(j) + whole * panel, rest, columns_of(i), width(), rest_, width());
    for (int64_t r = 0; r < points_; ++r)
      for (int64_t c = 0; c < rest; ++c) out[r * points_ + whole + c] = rest_[c * width() + r];
    replace_near(i, j, 0, points_, whole, points_, out);
  }

 private:
  // Dimensions that are multiplied before a tile goes on: 16 KiB of the vectors.
  static constexpr int64_t bytes_of_vectors = most_vectors * OTFACE_VEC_BYTES;
  static constexpr int64_t bytes_of_panel = panel * static_cast<int64_t>(sizeof(T));
  static constexpr int64_t block =
      16384 / (bytes_of_vectors > bytes_of_panel ? bytes_of_vectors : bytes_of_panel) / panel;

  int64_t width() const { return panels(points_) * panel; }
  const T* rows_of(int64_t set) const { return rows_ + set * depth_ * points_ * panel; }
  const T* columns_of(int64_t set) const { return columns_ + set * width() * depth_ * panel; }

  // out = 1 - a b for `height` rows of a and `count` columns of b.
  void multiply(const T* a, int64_t height, const T* b, int64_t count, T* out, int64_t out_stride) const {
    constexpr int64_t W = lanes<T>;
    const int64_t panel_stride = depth_ * panel * panel;
    for (int64_t begin = 0; begin < depth_; begin += block) {
      const int64_t end = begin + block < depth_ ? begin + block : depth_;
      for_vector_groups(count / W, [&](int64_t v, auto vectors) {
        const T* b_v = b + vector_at<T>(v, panel_stride);
        for_row_tiles(height, [&](int64_t r, auto tile_rows) {
          constexpr int R = decltype(tile_rows)::value, C = decltype(vectors)::value;
          Tile<T, R, C> tile;
          T* to = out + r * out_stride + v * W;
          for (int64_t d = begin; d < end; ++d)
            tile.add(panel, a + (d * points_ + r) * panel, panel, 1, b_v + d * panel * panel, panel_stride);
          tile.for_each([&](int q, int c, Vec<T> sum) {
            T* place = to + q * out_stride + c * W;
            store(place, (begin == 0 ? Vec<T>{} + T(1) : load<Vec<T>>(place)) - sum);
          });
        });
      });
    }
  }

  // Of the points [row, past_row) of i and [col, past_col) of j: see near.h.
  void replace_near(int64_t i, int64_t j, int64_t row, int64_t past_row, int64_t col, int64_t past_col, T* out) const {
    const auto one = [](auto zero, int64_t) { return zero + T(1); };
    for (int64_t r = row; r < past_row; ++r)
      for_near<Metric::cosine>(out + r * points_, col, past_col, share_, one, [&](int64_t c) {
        const TwoPoints<T> points{rows_of(i) + r * panel, rows_of(j) + c * panel, depth_ * panel, points_ * panel};
        out[r * points_ + c] = points.template cost<Metric::cosine>();
      });
  }

  int64_t points_, depth_;
  T share_;
  const T *rows_, *columns_;
  T* cost_;
  Buffer<T> rest_;  // [panel, width]: the last points of j by all of i
};

template <class T>
void cost(const CostParams& p, const Executor& executor) {
  const int64_t count = p.pairs.count, points = p.shape.points;
  if (count == 0) return;
  // A task is some pairs next to one another, which have the same i; or some rows of one, where there are few pairs.
  const int64_t wanted = 8 * executor.threads, most_grain = 8, most_parts = (points + panel - 1) / panel;
  const int64_t grain = count >= most_grain * wanted ? most_grain : count >= wanted ? count / wanted : 1;
  const int64_t needed = (wanted + count - 1) / count, parts = needed < most_parts ? needed : most_parts;
  const int64_t groups = (count + grain - 1) / grain;
  run_in_turn(executor, groups * parts, [&](const auto& next) {
    PairCost<T> pair(p);
    for (int64_t task = next(); task >= 0; task = next()) {
      const int64_t group = task / parts, part = task % parts;
      const int64_t end = (group + 1) * grain < count ? (group + 1) * grain : count;
      for (int64_t k = group * grain; k < end; ++k)
        pair.compute(k, p.pairs.first[k], p.pairs.second[k], points * part / parts, points * (part + 1) / parts);
    }
  });
}

}  // namespace
}  // namespace otface::pairs
