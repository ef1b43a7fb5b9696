// Between tensors and raw pointers: what the operators insist on, so that no kernel can be led out of bounds (users see the
// messages of the Python side first), and how they make their results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <vector>

#include "common/dtype.h"

namespace otface::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_tensor(const Tensor& t, const char* name, const Tensor& like, ScalarType dtype,
                         std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index() && t.is_cpu() == like.is_cpu(), name,
                  " is on another device than the first argument");
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

inline ScalarType real_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::Half: return DType::float16;
    case ScalarType::BFloat16: return DType::bfloat16;
    default: STD_TORCH_CHECK(false, name, " must be float64, float32, bfloat16 or float16");
  }
}

// An empty tensor where nothing is wanted.
inline Tensor make(const Tensor& like, bool wanted, ScalarType dtype, std::initializer_list<int64_t> shape) {
  const std::vector<int64_t> size = wanted ? std::vector<int64_t>(shape) : std::vector<int64_t>{0};
  return torch::stable::new_empty(like, {size.data(), size.size()}, dtype);
}

inline void* data(const Tensor& t, bool wanted = true) { return wanted ? t.mutable_data_ptr() : nullptr; }

}  // namespace otface::binding
