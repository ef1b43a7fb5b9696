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
    Tensor part = torch::stable::narrow(weight, 0, first, count);
    if (converts) {
      Tensor to = torch::stable::narrow(converted, 0, 0, count);
      part = torch::stable::copy_(to, part);
    }
    f(first, count, part);
  }
}

// A part of a flat buffer as a matrix.
inline Tensor matrix_in(Tensor& buffer, int64_t rows, int64_t cols, int64_t start = 0) {
  return torch::stable::view(torch::stable::narrow(buffer, 0, start, rows * cols), {rows, cols});
}

inline char* advance(const Tensor& t, int64_t elements) {
  return static_cast<char*>(t.mutable_data_ptr()) + elements * static_cast<int64_t>(t.element_size());
}

inline margin::Chunk chunk_of(const MarginShape& shape, int64_t first, int64_t count, double scale,
                              const Tensor& inverse_norms) {
  return {shape.is_double, shape.batch, count, first, scale, advance(inverse_norms, first)};
}

inline margin::Row* rows_of(const Tensor& rows) { return static_cast<margin::Row*>(rows.mutable_data_ptr()); }

inline Tensor make_rows(const Tensor& like, int64_t batch) {
  return make(like, true, ScalarType::Double, {batch, static_cast<int64_t>(sizeof(margin::Row) / sizeof(double))});
}

inline margin::StartParams start_params(const MarginShape& shape, const Tensor& x, const Tensor& weight,
                                        const Tensor& labels, const margin::Margin& form, double scale,
                                        int64_t ignore_index, bool drop_ignored, const Tensor& scaled_x,
                                        const Tensor& rows) {
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
          rows_of(rows)};
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

inline margin::Margin margin_of(double m1, double m2, double m3, int64_t beyond_pi, bool easy, bool straight_through) {
  STD_TORCH_CHECK(beyond_pi >= 0 && beyond_pi <= 2, "beyond_pi must be 0, 1 or 2");
  return {m1, m2, m3, static_cast<margin::BeyondPi>(beyond_pi), easy, straight_through};
}

// From H to the gradients: grad_x = H w and grad_weight = H^T x' before their projections. make_h(first, count, weight
// chunk) gives H of a chunk.
template <class Device, class MakeH>
std::tuple<Tensor, Tensor> margin_gradients(const MarginShape& shape, const Tensor& scaled_x, const Tensor& weight,
                                            const Tensor& rows, const Tensor& inverse_norms, bool want_x,
                                            bool want_weight, const MakeH& make_h) {
  const bool direct = weight.scalar_type() == shape.real;
  Tensor grad_x = make(scaled_x, want_x, shape.real, {shape.batch, shape.size});
  Tensor grad_weight = make(weight, want_weight, weight.scalar_type(), {shape.classes, shape.size});
  const Tensor buffer = make(scaled_x, want_weight && !direct, shape.real, {shape.chunk, shape.size});
  for_each_chunk(shape, weight, [&](int64_t first, int64_t count, Tensor& part) {
    Tensor h = make_h(first, count, part);
    if (want_x) Device::product(grad_x, h, part, first > 0);
    if (!want_weight) return;
    Tensor grad_part = torch::stable::narrow(grad_weight, 0, first, count);
    Tensor real_buffer = buffer;
    Tensor raw = direct ? grad_part : torch::stable::narrow(real_buffer, 0, 0, count);
    Device::product(raw, torch::stable::transpose(h, 0, 1), scaled_x, false);
    Device::project({shape.is_double, count, shape.size, data(raw), matrix_of(part, "weight"),
                     advance(inverse_norms, first), nullptr, data(raw)},
                    scaled_x);
    if (!direct) torch::stable::copy_(grad_part, raw);
  });
  if (want_x)
    Device::project({shape.is_double, shape.batch, shape.size, data(grad_x), matrix_of(scaled_x, "x"), nullptr,
                     rows_of(rows), data(grad_x)},
                    scaled_x);
  return {grad_x, grad_weight};
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using FourMarginTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Device>
FiveTensors margin_softmax_forward(Tensor x, Tensor weight, Tensor labels, OptionalTensor class_weight,
                                   OptionalTensor weight_sum, double m1, double m2, double m3, int64_t beyond_pi,
                                   bool easy, bool straight_through, double scale, int64_t ignore_index,
                                   double label_smoothing, ScalarType product_dtype, int64_t chunk_bytes,
                                   bool store_logits) {
  const MarginShape shape(x, weight, product_dtype, chunk_bytes);
  const int64_t B = shape.batch, C = shape.classes;
  const margin::LossSettings settings = loss_settings(shape, x, class_weight, weight_sum, scale, label_smoothing);
  const Tensor scaled_x = make(x, true, product_dtype, {B, shape.size}), rows = make_rows(x, B);
  const Tensor inverse_norms = make(x, true, shape.real, {C}), loss = make(x, true, shape.real, {B});
  Tensor cosines = make(x, store_logits, shape.real, {B * C});  // chunk after chunk, each a matrix of its own
  Device::start(start_params(shape, x, weight, labels, margin_of(m1, m2, m3, beyond_pi, easy, straight_through), scale,
                             ignore_index, true, scaled_x, rows),
                x);
  Tensor buffer = make(x, !store_logits, shape.real, {B * shape.chunk});
  for_each_chunk(shape, weight, [&](int64_t first, int64_t count, Tensor& part) {
    Device::inverse_norms({shape.is_double, matrix_of(part, "weight"), advance(inverse_norms, first)}, x);
    Tensor products = store_logits ? matrix_in(cosines, B, count, B * first) : matrix_in(buffer, B, count);
    Device::product(products, scaled_x, torch::stable::transpose(part, 0, 1), false);
    const void* u = class_weight ? advance(*class_weight, first) : nullptr;
    Device::forward_chunk({chunk_of(shape, first, count, scale, inverse_norms), data(products), products.stride(0),
                           store_logits, label_smoothing > 0, u, rows_of(rows)},
                          x);
  });
  Device::loss({shape.is_double, B, settings, rows_of(rows), data(loss)}, x);
  return {loss, scaled_x, rows, inverse_norms, cosines};
}

template <class Device>
std::tuple<Tensor, Tensor> margin_softmax_backward(Tensor scaled_x, Tensor weight, Tensor rows, Tensor inverse_norms,
                                                   Tensor cosines, OptionalTensor class_weight,
                                                   OptionalTensor weight_sum, Tensor grad_loss, double scale,
                                                   double label_smoothing, int64_t chunk_bytes, bool want_x,
                                                   bool want_weight) {
  const MarginShape shape(scaled_x, weight, scaled_x.scalar_type(), chunk_bytes);
  const int64_t B = shape.batch, C = shape.classes;
  const margin::LossSettings settings =
      loss_settings(shape, scaled_x, class_weight, weight_sum, scale, label_smoothing);
  check_contiguous(scaled_x, "scaled_x", scaled_x, scaled_x.scalar_type(), {B, shape.size});
  check_contiguous(rows, "rows", scaled_x, ScalarType::Double, {B, 8});
  check_contiguous(inverse_norms, "inverse_norms", scaled_x, shape.real, {C});
  check_contiguous(grad_loss, "grad_loss", scaled_x, shape.real, {B});
  const bool stored = cosines.size(0) > 0;
  if (stored) check_contiguous(cosines, "cosines", scaled_x, shape.real, {B * C});
  const bool in_place = shape.product_dtype == shape.real;
  Tensor buffer = make(scaled_x, !stored || in_place, shape.real, {B * shape.chunk});
  Tensor rounded = make(scaled_x, !in_place, shape.product_dtype, {B * shape.chunk});
  const auto make_h = [&](int64_t first, int64_t count, Tensor& part) {
    Tensor products = stored ? matrix_in(cosines, B, count, B * first) : matrix_in(buffer, B, count);
    if (!stored) Device::product(products, scaled_x, torch::stable::transpose(part, 0, 1), false);
    Tensor h = matrix_in(in_place ? buffer : rounded, B, count);
    Device::backward_chunk(
        {chunk_of(shape, first, count, scale, inverse_norms), settings, products.const_data_ptr(), products.stride(0),
         stored, grad_loss.const_data_ptr(), rows_of(rows), dtype_of(h, "product_dtype"), data(h)},
        scaled_x);
    return h;
  };
  return margin_gradients<Device>(shape, scaled_x, weight, rows, inverse_norms, want_x, want_weight, make_h);
}

template <class Device>
FourMarginTensors margin_logits_forward(Tensor x, Tensor weight, Tensor labels, double m1, double m2, double m3,
                                        int64_t beyond_pi, bool easy, bool straight_through, double scale,
                                        int64_t ignore_index, ScalarType product_dtype, int64_t chunk_bytes) {
  const MarginShape shape(x, weight, product_dtype, chunk_bytes);
  const int64_t B = shape.batch, C = shape.classes;
  const Tensor scaled_x = make(x, true, product_dtype, {B, shape.size}), rows = make_rows(x, B);
  const Tensor inverse_norms = make(x, true, shape.real, {C});
  Tensor logits = make(x, true, shape.real, {B, C});
  Device::start(start_params(shape, x, weight, labels, margin_of(m1, m2, m3, beyond_pi, easy, straight_through), scale,
                             ignore_index, false, scaled_x, rows),
                x);
  for_each_chunk(shape, weight, [&](int64_t first, int64_t count, Tensor& part) {
    Device::inverse_norms({shape.is_double, matrix_of(part, "weight"), advance(inverse_norms, first)}, x);
    Tensor products = torch::stable::narrow(logits, 1, first, count);
    Device::product(products, scaled_x, torch::stable::transpose(part, 0, 1), false);
    Device::logits(
        {chunk_of(shape, first, count, scale, inverse_norms), data(products), products.stride(0), rows_of(rows)}, x);
  });
  return {logits, scaled_x, rows, inverse_norms};
}

template <class Device>
std::tuple<Tensor, Tensor> margin_logits_backward(Tensor scaled_x, Tensor weight, Tensor rows, Tensor inverse_norms,
                                                  Tensor grad_logits, double scale, int64_t chunk_bytes, bool want_x,
                                                  bool want_weight) {
  const MarginShape shape(scaled_x, weight, scaled_x.scalar_type(), chunk_bytes);
  const int64_t B = shape.batch, C = shape.classes;
  check_contiguous(scaled_x, "scaled_x", scaled_x, scaled_x.scalar_type(), {B, shape.size});
  check_contiguous(rows, "rows", scaled_x, ScalarType::Double, {B, 8});
  check_contiguous(inverse_norms, "inverse_norms", scaled_x, shape.real, {C});
  check_tensor(grad_logits, "grad_logits", scaled_x, shape.real, {B, C});
  Tensor buffer = make(scaled_x, true, shape.product_dtype, {B * shape.chunk});
  const auto make_h = [&](int64_t first, int64_t count, Tensor&) {
    Tensor grad = torch::stable::narrow(grad_logits, 1, first, count), h = matrix_in(buffer, B, count);
    Device::logits_backward({chunk_of(shape, first, count, scale, inverse_norms), grad.const_data_ptr(), grad.stride(0),
                             grad.stride(1), rows_of(rows), dtype_of(h, "product_dtype"), data(h)},
                            scaled_x);
    return h;
  };
  return margin_gradients<Device>(shape, scaled_x, weight, rows, inverse_norms, want_x, want_weight, make_h);
}

// Registers the operators in the library `m` (of one dispatch key).
#define OTFACE_REGISTER_MARGIN(m, Device)                                                          \
  m.impl("margin_softmax_forward", TORCH_BOX(&otface::binding::margin_softmax_forward<Device>));   \
  m.impl("margin_softmax_backward", TORCH_BOX(&otface::binding::margin_softmax_backward<Device>)); \
  m.impl("margin_logits_forward", TORCH_BOX(&otface::binding::margin_logits_forward<Device>));     \
  m.impl("margin_logits_backward", TORCH_BOX(&otface::binding::margin_logits_backward<Device>))

}  // namespace otface::binding
