// The bodies of the margin operators, the same for every device: chunk by chunk a product, and the kernel that follows it.
// A Device has one function per kernel, whose last argument is a tensor on the device at hand, and the products.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "margin/params.h"
#include "torch/tensors.h"

namespace otface::binding {

// What every operator of the family knows of its arguments.
struct MarginShape {
  bool is_double;
  int64_t batch, size, classes;  // B, d, C
  int64_t chunk;                 // classes at a time
  ScalarType real, product_dtype;

  // A chunk's products and weights, and what they become, occupy at most `chunk_bytes`, or are 64 classes.
  MarginShape(const Tensor& x, const Tensor& weight, ScalarType product_dtype, int64_t chunk_bytes)
      : is_double(x.scalar_type() == ScalarType::Double), real(real_of(x)), product_dtype(product_dtype) {
    STD_TORCH_CHECK(x.dim() == 2, "x must be (B, d)");
    batch = x.size(0);
    size = x.size(1);
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == size, "weight must be (C, d), C >= 1");
    STD_TORCH_CHECK(x.get_device_index() == weight.get_device_index() && x.is_cpu() == weight.is_cpu(),
                    "weight is on another device than x");
    STD_TORCH_CHECK(is_double == (weight.scalar_type() == ScalarType::Double), "weight has the wrong dtype");
    STD_TORCH_CHECK(is_double ? product_dtype == real : product_dtype != ScalarType::Double,
                    "product_dtype does not go with x");
    STD_TORCH_CHECK(size == 0 || weight.stride(1) == 1, "weight must have adjacent columns");
    classes = weight.size(0);
    const int64_t per_class = (is_double ? 8 : 4) * 2 * (batch + size), fitting = chunk_bytes / per_class / 64 * 64;
    chunk = fitting < 64 ? 64 : fitting;
    if (chunk > classes) chunk = classes;
  }
};

inline margin::Matrix matrix_of(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), dtype_of(t, name), t.size(0), t.size(1), t.stride(0)};
}

// A chunk of the classes at a time: f(first, count, weight chunk in the dtype of the products).
template <class F>
void for_each_chunk(const MarginShape& shape, Tensor weight, const F& f) {
  const bool converts = weight.scalar_type() != shape.product_dtype;
  Tensor converted = make(weight, converts, shape.product_dtype, {shape.chunk, shape.size});
  for (int64_t first = 0; first < shape.classes; first += shape.chunk) {
    const int64_t count = shape.classes - first < shape.chunk ? shape.classes - first : shape.chunk;
    Tensor part = rows_from(weight, first, count);
    if (converts) {
      Tensor to = rows_from(converted, 0, count);
      part = torch::stable::copy_(to, part);
    }
    f(first, count, part);
  }
}

// A part of a flat buffer as a matrix.
inline Tensor matrix_in(const Tensor& buffer, int64_t rows, int64_t cols, int64_t start = 0) {
  return matrix_view(buffer, rows, cols, cols, 1, start);
}

inline char* advance(const Tensor& t, int64_t elements) {
  return static_cast<char*>(t.mutable_data_ptr()) + elements * static_cast<int64_t>(t.element_size());
}

inline margin::Chunk chunk_of(const MarginShape& shape, int64_t first, int64_t count, double scale,
                              const Tensor& inverse_norms) {
  return {shape.is_double, shape.batch, count, first, scale, advance(inverse_norms, first)};
}

constexpr int64_t row_size = sizeof(margin::Row) / sizeof(double);

inline margin::Row* rows_of(const Tensor& rows) { return static_cast<margin::Row*>(rows.mutable_data_ptr()); }

inline Tensor make_rows(const Tensor& like, int64_t batch) {
  return make(like, true, ScalarType::Double, {batch, row_size});
}

// The exponents of the classes [C], and whether one of them is not 0.
inline Tensor make_exponents(const Tensor& like, int64_t classes) {
  return make(like, true, ScalarType::Int, {classes + 1});
}
inline int32_t* exponents_of(const Tensor& exponents, int64_t first) {
  return static_cast<int32_t*>(exponents.mutable_data_ptr()) + first;
}

// What may change from step to step: m1, m2, m3, scale and, of the loss, label_smoothing. They are in a tensor on the
// CPU, so that a compiled graph need not know their values.
inline const double* numbers_of(const Tensor& numbers, int64_t count) {
  STD_TORCH_CHECK(numbers.is_cpu() && numbers.scalar_type() == ScalarType::Double && numbers.is_contiguous() &&
                      numbers.dim() == 1 && numbers.size(0) == count,
                  "numbers must be ", count, " float64 numbers on the CPU");
  return numbers.const_data_ptr<double>();
}

inline margin::StartParams start_params(const MarginShape& shape, const Tensor& x, const Tensor& weight,
                                        const Tensor& labels, const margin::Margin& form, double scale,
                                        int64_t ignore_index, bool drop_ignored, const Tensor& scaled_x,
                                        const Tensor& rows, const Tensor& exponents) {
  check_contiguous(labels, "labels", x, ScalarType::Long, {shape.batch});
  STD_TORCH_CHECK(shape.size == 0 || x.stride(1) == 1, "x must have adjacent columns");
  return {shape.is_double,
          matrix_of(x, "x"),
          matrix_of(weight, "weight"),
          labels.const_data_ptr<int64_t>(),
          ignore_index,
          drop_ignored,
          form,
          scale,
          dtype_of(scaled_x, "product_dtype"),
          data(scaled_x),
          rows_of(rows),
          exponents_of(exponents, shape.classes)};
}

inline margin::LossSettings loss_settings(const MarginShape& shape, const Tensor& like,
                                          const OptionalTensor& class_weight, const OptionalTensor& weight_sum,
                                          double scale, double label_smoothing) {
  if (class_weight) check_contiguous(*class_weight, "class_weight", like, shape.real, {shape.classes});
  STD_TORCH_CHECK(weight_sum || label_smoothing == 0, "label smoothing needs weight_sum");
  if (weight_sum) check_contiguous(*weight_sum, "weight_sum", like, ScalarType::Double, {1});
  return {scale, label_smoothing, class_weight ? class_weight->const_data_ptr() : nullptr,
          weight_sum ? weight_sum->const_data_ptr<double>() : nullptr, shape.classes};
}

inline margin::Margin margin_of(const double* numbers, int64_t beyond_pi, bool easy, bool straight_through) {
  STD_TORCH_CHECK(beyond_pi >= 0 && beyond_pi <= 2, "beyond_pi must be 0, 1 or 2");
  return {numbers[0], numbers[1], numbers[2], static_cast<margin::BeyondPi>(beyond_pi), easy, straight_through};
}

inline margin::NormsParams norms_params(const MarginShape& shape, const Tensor& part, const Tensor& inverse_norms,
                                        const Tensor& exponents, int64_t first) {
  return {shape.is_double, matrix_of(part, "weight"), advance(inverse_norms, first), exponents_of(exponents, first),
          exponents_of(exponents, shape.classes)};
}

// What a forward has left for the gradient.
inline void check_saved(const MarginShape& shape, const Tensor& scaled_x, const Tensor& rows,
                        const Tensor& inverse_norms, const Tensor& exponents) {
  check_contiguous(scaled_x, "scaled_x", scaled_x, shape.product_dtype, {shape.batch, shape.size});
  check_contiguous(rows, "rows", scaled_x, ScalarType::Double, {shape.batch, row_size});
  check_contiguous(inverse_norms, "inverse_norms", scaled_x, shape.real, {shape.classes});
  check_contiguous(exponents, "exponents", scaled_x, ScalarType::Int, {shape.classes + 1});
}

// The products of a chunk of classes.
template <class Device>
void multiply_chunk(const MarginShape& shape, const Tensor& scaled_x, const Tensor& part, const Tensor& exponents,
                    int64_t first, Tensor& products) {
  Device::product(products, scaled_x, transposed(part), false);
  Device::rescaled_products({shape.is_double, matrix_of(scaled_x, "x"), matrix_of(part, "weight"),
                             exponents_of(exponents, first), data(products), products.stride(0)},
                            scaled_x);
}

// From H to the gradients: grad_x = H w and grad_weight = H^T x' before their projections. make_h(first, count, weight
// chunk) gives H of a chunk, and of aligned rows' targets in `own` what is not in H.
template <class Device, class MakeH>
std::tuple<Tensor, Tensor> margin_gradients(const MarginShape& shape, const Tensor& scaled_x, const Tensor& weight,
                                            const Tensor& rows, const Tensor& inverse_norms, const Tensor& exponents,
                                            const Tensor& own, bool want_x, bool want_weight, const MakeH& make_h) {
  const bool direct = weight.scalar_type() == shape.real;
  Tensor grad_x = make(scaled_x, want_x, shape.real, {shape.batch, shape.size});
  Tensor grad_weight = make(weight, want_weight, weight.scalar_type(), {shape.classes, shape.size});
  const Tensor buffer = make(scaled_x, want_weight && !direct, shape.real, {shape.chunk, shape.size});
  for_each_chunk(shape, weight, [&](int64_t first, int64_t count, Tensor& part) {
    Tensor h = make_h(first, count, part);
    if (want_weight) {
      Tensor grad_part = rows_from(grad_weight, first, count);
      Tensor raw = direct ? grad_part : rows_from(buffer, 0, count);
      Device::product(raw, transposed(h), scaled_x, false);
      Device::project({shape.is_double, count, shape.size, data(raw), matrix_of(part, "weight"),
                       advance(inverse_norms, first), exponents_of(exponents, first), nullptr, data(raw)},
                      scaled_x);
      const Tensor weights = rows_from(weight, first, count);
      Device::own_gradients_of_weight({shape.is_double, matrix_of(scaled_x, "x"), matrix_of(weights, "weight"), first,
                                       rows_of(rows), own.const_data_ptr<double>(), data(raw)},
                                      scaled_x);
      if (!direct) torch::stable::copy_(grad_part, raw);
    }
    if (want_x) {
      const bool add =
          Device::rescaled_gradients({shape.is_double, matrix_of(part, "weight"), exponents_of(exponents, first),
                                      exponents_of(exponents, shape.classes), shape.batch, dtype_of(h, "product_dtype"),
                                      data(h), first > 0, data(grad_x)},
                                     scaled_x);
      Device::product(grad_x, h, part, add);
    }
  });
  if (want_x) {
    Device::project({shape.is_double, shape.batch, shape.size, data(grad_x), matrix_of(scaled_x, "x"), nullptr, nullptr,
                     rows_of(rows), data(grad_x)},
                    scaled_x);
    Device::own_gradients_of_x({shape.is_double, matrix_of(scaled_x, "x"), matrix_of(weight, "weight"), 0,
                                rows_of(rows), own.const_data_ptr<double>(), data(grad_x)},
                               scaled_x);
  }
  return {grad_x, grad_weight};
}

using MarginLoss = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using MarginLogits = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
MarginLoss margin_softmax_forward(Tensor x, Tensor weight, Tensor labels, OptionalTensor class_weight,
                                  OptionalTensor weight_sum, Tensor numbers, int64_t beyond_pi, bool easy,
                                  bool straight_through, int64_t ignore_index, ScalarType product_dtype,
                                  int64_t chunk_bytes, bool store_logits) {
  const MarginShape shape(x, weight, product_dtype, chunk_bytes);
  const int64_t B = shape.batch, C = shape.classes;
  const double* of = numbers_of(numbers, 5);
  const double scale = of[3], label_smoothing = of[4];
  const margin::LossSettings settings = loss_settings(shape, x, class_weight, weight_sum, scale, label_smoothing);
  const Tensor scaled_x = make(x, true, product_dtype, {B, shape.size}), rows = make_rows(x, B);
  const Tensor inverse_norms = make(x, true, shape.real, {C}), exponents = make_exponents(x, C);
  const Tensor loss = make(x, true, shape.real, {B});
  Tensor cosines = make(x, store_logits, shape.real, {B * C});  // chunk after chunk, each a matrix of its own
  Device::start(start_params(shape, x, weight, labels, margin_of(of, beyond_pi, easy, straight_through), scale,
                             ignore_index, true, scaled_x, rows, exponents),
                x);
  Tensor buffer = make(x, !store_logits, shape.real, {B * shape.chunk});
  for_each_chunk(shape, weight, [&](int64_t first, int64_t count, Tensor& part) {
    Device::inverse_norms(norms_params(shape, part, inverse_norms, exponents, first), x);
    Tensor products = store_logits ? matrix_in(cosines, B, count, B * first) : matrix_in(buffer, B, count);
    multiply_chunk<Device>(shape, scaled_x, part, exponents, first, products);
    const void* u = class_weight ? advance(*class_weight, first) : nullptr;
    Device::forward_chunk({chunk_of(shape, first, count, scale, inverse_norms), data(products), products.stride(0),
                           store_logits, label_smoothing > 0, u, rows_of(rows)},
                          x);
  });
  Device::loss({shape.is_double, B, settings, rows_of(rows), data(loss)}, x);
  return {loss, scaled_x, rows, inverse_norms, exponents, cosines};
}

template <class Device>
std::tuple<Tensor, Tensor> margin_softmax_backward(Tensor scaled_x, Tensor weight, Tensor rows, Tensor inverse_norms,
                                                   Tensor exponents, Tensor cosines, OptionalTensor class_weight,
                                                   OptionalTensor weight_sum, Tensor grad_loss, Tensor numbers,
                                                   int64_t chunk_bytes, bool want_x, bool want_weight) {
  const MarginShape shape(scaled_x, weight, scaled_x.scalar_type(), chunk_bytes);
  const int64_t B = shape.batch, C = shape.classes;
  const double* of = numbers_of(numbers, 5);
  const double scale = of[3], label_smoothing = of[4];
  const margin::LossSettings settings =
      loss_settings(shape, scaled_x, class_weight, weight_sum, scale, label_smoothing);
  check_saved(shape, scaled_x, rows, inverse_norms, exponents);
  check_contiguous(grad_loss, "grad_loss", scaled_x, shape.real, {B});
  const bool stored = cosines.size(0) > 0;
  if (stored) check_contiguous(cosines, "cosines", scaled_x, shape.real, {B * C});
  const bool in_place = shape.product_dtype == shape.real;
  Tensor buffer = make(scaled_x, !stored || in_place, shape.real, {B * shape.chunk});
  Tensor rounded = make(scaled_x, !in_place, shape.product_dtype, {B * shape.chunk});
  const Tensor own = make(scaled_x, true, ScalarType::Double, {B});
  const auto make_h = [&](int64_t first, int64_t count, Tensor& part) {
    Tensor products = stored ? matrix_in(cosines, B, count, B * first) : matrix_in(buffer, B, count);
    if (!stored) multiply_chunk<Device>(shape, scaled_x, part, exponents, first, products);
    Tensor h = matrix_in(in_place ? buffer : rounded, B, count);
    Device::backward_chunk({chunk_of(shape, first, count, scale, inverse_norms), settings, products.const_data_ptr(),
                            products.stride(0), stored, grad_loss.const_data_ptr(), rows_of(rows),
                            dtype_of(h, "product_dtype"), data(h), own.mutable_data_ptr<double>()},
                           scaled_x);
    return h;
  };
  return margin_gradients<Device>(shape, scaled_x, weight, rows, inverse_norms, exponents, own, want_x, want_weight,
                                  make_h);
}

template <class Device>
MarginLogits margin_logits_forward(Tensor x, Tensor weight, Tensor labels, Tensor numbers, int64_t beyond_pi, bool easy,
                                   bool straight_through, int64_t ignore_index, ScalarType product_dtype,
                                   int64_t chunk_bytes) {
  const MarginShape shape(x, weight, product_dtype, chunk_bytes);
  const int64_t B = shape.batch, C = shape.classes;
  const Tensor scaled_x = make(x, true, product_dtype, {B, shape.size}), rows = make_rows(x, B);
  const Tensor inverse_norms = make(x, true, shape.real, {C}), exponents = make_exponents(x, C);
  const double* of = numbers_of(numbers, 4);
  const double scale = of[3];
  Tensor logits = make(x, true, shape.real, {B, C});
  Device::start(start_params(shape, x, weight, labels, margin_of(of, beyond_pi, easy, straight_through), scale,
                             ignore_index, false, scaled_x, rows, exponents),
                x);
  for_each_chunk(shape, weight, [&](int64_t first, int64_t count, Tensor& part) {
    Device::inverse_norms(norms_params(shape, part, inverse_norms, exponents, first), x);
    Tensor products = columns_from(logits, first, count);
    multiply_chunk<Device>(shape, scaled_x, part, exponents, first, products);
    Device::logits(
        {chunk_of(shape, first, count, scale, inverse_norms), data(products), products.stride(0), rows_of(rows)}, x);
  });
  return {logits, scaled_x, rows, inverse_norms, exponents};
}

template <class Device>
std::tuple<Tensor, Tensor> margin_logits_backward(Tensor scaled_x, Tensor weight, Tensor rows, Tensor inverse_norms,
                                                  Tensor exponents, Tensor grad_logits, Tensor numbers,
                                                  int64_t chunk_bytes, bool want_x, bool want_weight) {
  const MarginShape shape(scaled_x, weight, scaled_x.scalar_type(), chunk_bytes);
  const int64_t B = shape.batch, C = shape.classes;
  const double scale = numbers_of(numbers, 4)[3];
  check_saved(shape, scaled_x, rows, inverse_norms, exponents);
  check_tensor(grad_logits, "grad_logits", scaled_x, shape.real, {B, C});
  Tensor buffer = make(scaled_x, true, shape.product_dtype, {B * shape.chunk});
  const Tensor own = make(scaled_x, true, ScalarType::Double, {B});
  const auto make_h = [&](int64_t first, int64_t count, Tensor&) {
    Tensor grad = columns_from(grad_logits, first, count), h = matrix_in(buffer, B, count);
    Device::logits_backward(
        {chunk_of(shape, first, count, scale, inverse_norms), grad.const_data_ptr(), grad.stride(0), grad.stride(1),
         rows_of(rows), dtype_of(h, "product_dtype"), data(h), own.mutable_data_ptr<double>()},
        scaled_x);
    return h;
  };
  return margin_gradients<Device>(shape, scaled_x, weight, rows, inverse_norms, exponents, own, want_x, want_weight,
                                  make_h);
}

// Registers the operators in the library `m` (of one dispatch key).
#define OTFACE_REGISTER_MARGIN(m, Device)                                                          \
  m.impl("margin_softmax_forward", TORCH_BOX(&otface::binding::margin_softmax_forward<Device>));   \
  m.impl("margin_softmax_backward", TORCH_BOX(&otface::binding::margin_softmax_backward<Device>)); \
  m.impl("margin_logits_forward", TORCH_BOX(&otface::binding::margin_logits_forward<Device>));     \
  m.impl("margin_logits_backward", TORCH_BOX(&otface::binding::margin_logits_backward<Device>))

}  // namespace otface::binding
