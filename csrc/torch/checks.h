// What the operators insist on, so that no kernel can be led out of bounds. Users see the messages of the Python side first.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

namespace otface::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_tensor(const Tensor& t, const char* name, const Tensor& like, ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index() && t.is_cpu() == like.is_cpu(), name,
                  " is on another device than the cost");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(shape.size()), name, " has the wrong number of dimensions");
  int64_t d = 0;
  for (const int64_t size : shape) STD_TORCH_CHECK(t.size(d++) == size, name, " has the wrong shape");
}

inline void check_contiguous(const Tensor& t, const char* name, const Tensor& like, ScalarType dtype,
                             std::initializer_list<int64_t> shape) {
  check_tensor(t, name, like, dtype, shape);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

}  // namespace otface::binding
