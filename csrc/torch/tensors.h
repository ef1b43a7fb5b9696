// Between tensors and raw pointers: what the operators insist on, so that no kernel can be led out of bounds (users see the
// messages of the Python side first), and how they make their results.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstddef>
#include <initializer_list>
#include <optional>

#include "common/dtype.h"

namespace otface::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The sizes of a tensor, outermost first.
class Shape {
 public:
  Shape(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) add(size);
  }
  void add(int64_t size) {
    STD_TORCH_CHECK(rank_ < most, "more than four dimensions");
    sizes_[rank_++] = size;
  }
  int64_t rank() const { return static_cast<int64_t>(rank_); }
  const int64_t* begin() const { return sizes_.data(); }
  const int64_t* end() const { return sizes_.data() + rank_; }

 private:
  static constexpr size_t most = 4;
  std::array<int64_t, most> sizes_{};
  size_t rank_ = 0;
};

inline void check_tensor(const Tensor& t, const char* name, const Tensor& like, ScalarType dtype, const Shape& shape) {
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index() && t.is_cpu() == like.is_cpu(), name,
                  " is on another device than the first argument");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == shape.rank(), name, " has the wrong number of dimensions");
  int64_t d = 0;
  for (const int64_t size : shape) STD_TORCH_CHECK(t.size(d++) == size, name, " has the wrong shape");
}

inline void check_contiguous(const Tensor& t, const char* name, const Tensor& like, ScalarType dtype,
                             const Shape& shape) {
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

// A contiguous tensor that holds anything, on the device of `like`; an empty one where nothing is wanted. Not through torch's
// dispatcher, where the eleven results of a solve would take longer than a small solve itself.
inline Tensor make(const Tensor& like, bool wanted, ScalarType dtype, const Shape& wanted_shape) {
  const Shape shape = wanted ? wanted_shape : Shape{0};
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (int64_t d = shape.rank() - 1; d >= 0; --d) {
    strides[static_cast<size_t>(d)] = stride;
    stride *= shape.begin()[d] > 0 ? shape.begin()[d] : 1;
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.rank(), shape.begin(), strides.data(), dtype_code, device_type,
                                                  like.get_device_index(), &made));
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
