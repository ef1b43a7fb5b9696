// The operators on listed pairs of point sets: tensors in, kernels, tensors out. They are on the CPU only; elsewhere the
// matrix products of copies are torch's (see otface_cuda/pair_costs.py).
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

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

// Registers the operators in the library `m` (of one dispatch key).
#define OTFACE_REGISTER_PAIRS(m, Device)                                                   \
  m.impl("pack_points", TORCH_BOX(&otface::binding::pack_points<Device>));                 \
  m.impl("pair_costs", TORCH_BOX(&otface::binding::pair_costs<Device>));                   \
  m.impl("pair_costs_backward", TORCH_BOX(&otface::binding::pair_costs_backward<Device>)); \
  m.impl("unpack_gradient", TORCH_BOX(&otface::binding::unpack_gradient<Device>))

}  // namespace otface::binding
