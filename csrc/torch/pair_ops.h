// The operators on the costs of points: tensors in, kernels, tensors out. Those on listed pairs of point sets are on the
// CPU only; elsewhere the matrix products of copies are torch's (see otface_cuda/pair_costs.py), and what is wrong with
// these for near points is mended on every device.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "pairs/near.h"
#include "pairs/params.h"
#include "torch/tensors.h"

namespace otface::binding {

// From rows (N, D, p, panel); how many of the D * panel dimensions are padding does not matter to the products.
inline pairs::Shape shape_of_rows(const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 4 && rows.size(3) == pairs::panel, "rows must be (N, D, p, 16)");
  const pairs::Shape shape{rows.scalar_type() == ScalarType::Double, rows.size(0), rows.size(2),
                           rows.size(1) * pairs::panel};
  check_contiguous(rows, "rows", rows, real_of(rows), {shape.sets, rows.size(1), shape.points, pairs::panel});
  return shape;
}

inline pairs::PairList pair_list(const Tensor& first, const Tensor& second, const Tensor& rows) {
  const int64_t count = first.size(0);
  check_contiguous(first, "first", rows, ScalarType::Long, {count});
  check_contiguous(second, "second", rows, ScalarType::Long, {count});
  const pairs::PairList list{count, first.const_data_ptr<int64_t>(), second.const_data_ptr<int64_t>()};
  for (int64_t k = 0; k < count; ++k)
    STD_TORCH_CHECK(
        list.first[k] >= 0 && list.first[k] < rows.size(0) && list.second[k] >= 0 && list.second[k] < rows.size(0),
        "first and second must be between 0 and N - 1");
  return list;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> pack_points(Tensor points, bool want_columns) {
  STD_TORCH_CHECK(points.dim() == 3, "points must be (N, p, d)");
  const pairs::Shape shape{points.scalar_type() == ScalarType::Double, points.size(0), points.size(1), points.size(2)};
  const int64_t depth = pairs::depth_of(shape.size);
  const Tensor rows = make(points, true, real_of(points), {shape.sets, depth, shape.points, pairs::panel});
  const Tensor columns = make(points, want_columns, real_of(points),
                              {shape.sets, pairs::panels(shape.points), depth * pairs::panel, pairs::panel});
  const Tensor lengths = make(points, true, ScalarType::Double, {shape.sets, shape.points});
  Device::pack(
      {shape,
       {points.const_data_ptr(), dtype_of(points, "points"), points.stride(0), points.stride(1), points.stride(2)},
       data(rows),
       data(columns, want_columns),
       static_cast<double*>(data(lengths))});
  return {rows, columns, lengths};
}

template <class Device>
void pair_costs(Tensor rows, Tensor columns, Tensor first, Tensor second, Tensor cost) {
  const pairs::Shape shape = shape_of_rows(rows);
  check_contiguous(columns, "columns", rows, rows.scalar_type(),
                   {shape.sets, pairs::panels(shape.points), shape.size, pairs::panel});
  const pairs::PairList list = pair_list(first, second, rows);
  check_contiguous(cost, "cost", rows, rows.scalar_type(), {list.count, shape.points, shape.points});
  Device::pair_costs({shape, list, rows.const_data_ptr(), columns.const_data_ptr(), data(cost)});
}

template <class Device>
void pair_costs_backward(Tensor rows, Tensor grad_cost, Tensor first, Tensor second, Tensor sums) {
  const pairs::Shape shape = shape_of_rows(rows);
  const pairs::PairList list = pair_list(first, second, rows);
  check_contiguous(grad_cost, "grad_cost", rows, rows.scalar_type(), {list.count, shape.points, shape.points});
  check_contiguous(sums, "sums", rows, rows.scalar_type(), {shape.sets, rows.size(1), shape.points, pairs::panel});
  Device::pair_costs_backward({shape, list, rows.const_data_ptr(), grad_cost.const_data_ptr(), data(sums)});
}

template <class Device>
void unpack_gradient(Tensor sums, Tensor rows, Tensor lengths, Tensor grad) {
  pairs::Shape shape = shape_of_rows(rows);
  check_contiguous(sums, "sums", rows, rows.scalar_type(), {shape.sets, rows.size(1), shape.points, pairs::panel});
  check_contiguous(lengths, "lengths", rows, ScalarType::Double, {shape.sets, shape.points});
  STD_TORCH_CHECK(grad.dim() == 3 && pairs::depth_of(grad.size(2)) == rows.size(1), "grad must be (N, p, d)");
  shape.size = grad.size(2);
  check_tensor(grad, "grad", rows, rows.scalar_type(), {shape.sets, shape.points, shape.size});
  Device::unpack_gradient({shape, sums.const_data_ptr(), rows.const_data_ptr(), lengths.const_data_ptr<double>(),
                           data(grad), grad.stride(0), grad.stride(1), grad.stride(2)});
}

inline pairs::CostShape cost_shape(const Tensor& cost, const Tensor& x, int64_t metric, bool has_squares) {
  STD_TORCH_CHECK(cost.dim() == 3 && x.dim() == 3, "cost must be (B, n, m), x (B, n, d)");
  STD_TORCH_CHECK(metric >= 0 && metric <= 2 && (metric > 0) == has_squares,
                  "metric must be 0 without squares, 1 or 2");
  const pairs::CostShape shape{cost.scalar_type() == ScalarType::Double,
                               static_cast<pairs::Metric>(metric),
                               cost.size(0),
                               cost.size(1),
                               cost.size(2),
                               x.size(2)};
  check_contiguous(cost, "cost", cost, real_of(cost), {shape.batch, shape.rows, shape.cols});
  return shape;
}

inline const void* squares_of(const OptionalTensor& squares, const char* name, const Tensor& cost, int64_t points) {
  if (!squares) return nullptr;
  check_contiguous(*squares, name, cost, cost.scalar_type(), {cost.size(0), points});
  return squares->const_data_ptr();
}

inline pairs::PointSets point_sets(const pairs::CostShape& shape, const Tensor& cost, const Tensor& x, const Tensor& y,
                                   const OptionalTensor& x_squares, const OptionalTensor& y_squares) {
  check_contiguous(x, "x", cost, cost.scalar_type(), {shape.batch, shape.rows, shape.size});
  check_contiguous(y, "y", cost, cost.scalar_type(), {shape.batch, shape.cols, shape.size});
  STD_TORCH_CHECK(x_squares.has_value() == y_squares.has_value(), "x_squares and y_squares go together");
  return {x.const_data_ptr(), y.const_data_ptr(), squares_of(x_squares, "x_squares", cost, shape.rows),
          squares_of(y_squares, "y_squares", cost, shape.cols)};
}

template <class Device>
void near_costs(Tensor cost, Tensor x, Tensor y, OptionalTensor x_squares, OptionalTensor y_squares, int64_t metric) {
  const pairs::CostShape shape = cost_shape(cost, x, metric, x_squares.has_value());
  Device::near_costs({shape, point_sets(shape, cost, x, y, x_squares, y_squares), data(cost)}, cost);
}

template <class Device>
Tensor far_weights(Tensor cost, Tensor grad, Tensor x, Tensor y, Tensor x_squares, Tensor y_squares, int64_t metric) {
  const pairs::CostShape shape = cost_shape(cost, x, metric, true);
  check_contiguous(grad, "grad", cost, cost.scalar_type(), {shape.batch, shape.rows, shape.cols});
  const Tensor weights = make(cost, true, cost.scalar_type(), {shape.batch, shape.rows, shape.cols});
  Device::far_weights({shape, point_sets(shape, cost, x, y, x_squares, y_squares), cost.const_data_ptr(),
                       grad.const_data_ptr(), data(weights)},
                      cost);
  return weights;
}

template <class Device>
std::tuple<Tensor, Tensor> near_gradient(Tensor cost, Tensor grad, Tensor x, Tensor y, Tensor x_squares,
                                         Tensor y_squares, int64_t metric, Tensor far_x, Tensor far_y) {
  const pairs::CostShape shape = cost_shape(cost, x, metric, true);
  check_contiguous(grad, "grad", cost, cost.scalar_type(), {shape.batch, shape.rows, shape.cols});
  check_contiguous(far_x, "far_x", cost, cost.scalar_type(), {shape.batch, shape.rows, shape.size});
  check_contiguous(far_y, "far_y", cost, cost.scalar_type(), {shape.batch, shape.cols, shape.size});
  const Tensor grad_x = make(cost, true, cost.scalar_type(), {shape.batch, shape.rows, shape.size});
  const Tensor grad_y = make(cost, true, cost.scalar_type(), {shape.batch, shape.cols, shape.size});
  Device::near_gradient(
      {shape, point_sets(shape, cost, x, y, x_squares, y_squares), cost.const_data_ptr(), grad.const_data_ptr(),
       far_x.const_data_ptr(), far_y.const_data_ptr(), data(grad_x), data(grad_y)},
      cost);
  return {grad_x, grad_y};
}

// Registers the operators in the library `m` (of one dispatch key).
#define OTFACE_REGISTER_NEAR(m, Device)                                    \
  m.impl("near_costs", TORCH_BOX(&otface::binding::near_costs<Device>));   \
  m.impl("far_weights", TORCH_BOX(&otface::binding::far_weights<Device>)); \
  m.impl("near_gradient", TORCH_BOX(&otface::binding::near_gradient<Device>))
#define OTFACE_REGISTER_PAIRS(m, Device)                                                   \
  m.impl("pack_points", TORCH_BOX(&otface::binding::pack_points<Device>));                 \
  m.impl("pair_costs", TORCH_BOX(&otface::binding::pair_costs<Device>));                   \
  m.impl("pair_costs_backward", TORCH_BOX(&otface::binding::pair_costs_backward<Device>)); \
  m.impl("unpack_gradient", TORCH_BOX(&otface::binding::unpack_gradient<Device>))

}  // namespace otface::binding
