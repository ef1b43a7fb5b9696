// Between tensors and raw pointers: what the operators insist on, so that no kernel can be led out of bounds (users see the
// messages of the Python side first), and how they make their results.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <initializer_list>
#include <optional>

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
  static constexpr int64_t nothing[] = {0};
  const int64_t* size = wanted ? shape.begin() : nothing;
  const std::size_t rank = wanted ? shape.size() : 1;
  STD_TORCH_CHECK(rank <= 4, "results have at most four dimensions");
  int64_t strides[4], stride = 1;
  for (std::size_t d = rank; d-- > 0; stride *= size[d]) strides[d] = stride;
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  // By this function of the ABI rather than through the dispatcher, which looks an operator up by its name each time.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(rank), size, strides, dtype_code, device_type,
                                                  device_index, &made));
  return Tensor(made);
}

// The same memory, `offset` elements further on, as a matrix.
inline Tensor matrix_view(const Tensor& t, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
                          int64_t offset = 0) {
  const int64_t size[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, size, strides, offset, &view));
  return Tensor(view);
}
inline Tensor transposed(const Tensor& t) { return matrix_view(t, t.size(1), t.size(0), t.stride(1), t.stride(0)); }
// `count` rows of a matrix from the first on, or columns.
inline Tensor rows_from(const Tensor& t, int64_t first, int64_t count) {
  return matrix_view(t, count, t.size(1), t.stride(0), t.stride(1), first * t.stride(0));
}
inline Tensor columns_from(const Tensor& t, int64_t first, int64_t count) {
  return matrix_view(t, t.size(0), count, t.stride(0), t.stride(1), first * t.stride(1));
}

inline void* data(const Tensor& t, bool wanted = true) { return wanted ? t.mutable_data_ptr() : nullptr; }

}  // namespace otface::binding
