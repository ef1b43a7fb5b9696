// Cosine costs of listed pairs of point sets, and their gradient: plain structs of raw pointers.
//
// N sets of p points in d dimensions, u = x / |x| (0 for x = 0). For pair k = (i, j) of the list:
//
//   C_k = 1 - U_i U_j^T, where points are near by their differences: near.h  [p, p]
//   S_i += G_k U_j,  S_j += G_k^T U_i    for an incoming gradient G_k;  then  dx = -(S - u <u, S>) / |x|
//
// The products read the sets where they lie, in two orders that an instruction set of any width can load from. "Real" is
// double for double points, else float; `panel` Reals are one or two cache lines. Zero where d or p is no multiple.
//   rows    [N, D, p, panel]        D = ceil(d / panel), at least 1: `panel` dimensions of one point
//   columns [N, P, D * panel, panel]  P = ceil(p / panel): one dimension of `panel` points
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace otface::pairs {

constexpr int64_t panel = 16;

inline int64_t panels(int64_t count) { return (count + panel - 1) / panel; }

// D; one also of no dimensions, whose products are 0.
inline int64_t depth_of(int64_t size) { return size == 0 ? 1 : panels(size); }

struct Shape {
  bool is_double;  // Real
  int64_t sets, points, size;
};

struct PointsView {
  const void* data;  // [N, p, d]; strides count elements
  DType dtype;
  int64_t set_stride, point_stride, stride;
};

struct PackParams {
  Shape shape;
  PointsView points;
  void* rows;       // [N, D, p, panel] Real, of unit length
  void* columns;    // [N, P, D * panel, panel] Real, or null
  double* lengths;  // [N, p]: |x|
};

struct PairList {
  int64_t count;
  const int64_t* first;   // [K], between 0 and N - 1
  const int64_t* second;  // [K]
};

struct CostParams {
  Shape shape;
  PairList pairs;
  const void* rows;
  const void* columns;
  void* cost;  // [K, p, p] Real
};

struct GradientParams {
  Shape shape;
  PairList pairs;
  const void* rows;
  const void* grad_cost;  // [K, p, p] Real
  void* sums;             // [N, D, p, panel] Real: S, which is added to
};

struct UnpackParams {
  Shape shape;
  const void* sums;
  const void* rows;
  const double* lengths;
  void* grad;  // [N, p, d] Real; strides as below
  int64_t set_stride, point_stride, stride;
};

}  // namespace otface::pairs
