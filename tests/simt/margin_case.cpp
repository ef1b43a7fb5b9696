// Runs one kernel of csrc/margin/launch_cuda.h. What is in the arguments: margin.py.
#include <cstring>
#include <stdexcept>

#include "case.h"
#include "common/simt.h"
#include "margin/launch_cuda.h"
#include "named_arrays.h"

namespace otface::test {

using namespace margin;

namespace {

class MarginCase : NamedArrays {
 public:
  explicit MarginCase(const Arrays& arguments) : NamedArrays(arguments) {}

  Arrays run() {
    const std::string step(static_cast<const char*>(needed("margin_step").data()), needed("margin_step").bytes);
    if (step == "start")
      start();
    else if (step == "inverse_norms")
      inverse_norms();
    else if (step == "rescaled_products")
      rescaled_products();
    else if (step == "forward_chunk")
      forward_chunk();
    else if (step == "loss")
      loss();
    else if (step == "backward_chunk")
      backward_chunk();
    else if (step == "logits")
      logits();
    else if (step == "logits_backward")
      logits_backward();
    else if (step == "rescaled_gradients")
      rescaled_gradients();
    else if (step == "project")
      project();
    else if (step == "own_gradients_of_x")
      own_gradients(own_gradients_of_x_cuda);
    else if (step == "own_gradients_of_weight")
      own_gradients(own_gradients_of_weight_cuda);
    else
      throw std::runtime_error("no such step");
    return std::move(results_);
  }

 private:
  void start() {
    const Matrix x = matrix("x");
    const double* m = static_cast<const double*>(needed("margin").data());
    const Margin margin{m[0], m[1], m[2], static_cast<BeyondPi>(static_cast<int>(m[3])), m[4] != 0, m[5] != 0};
    void* scaled_x = result("scaled_x", type_of(product_dtype()), {x.rows, x.cols});
    void* rows = result("rows", 'd', {x.rows, row_size});
    auto* any_rescaled = static_cast<int32_t*>(result("any_rescaled", 'i', {1}));
    check(start_cuda({is_double(), x, matrix("weight"), static_cast<const int64_t*>(needed("labels").data()),
                      integer("ignore_index", -100), integer("drop_ignored", 0) != 0, margin, number("scale", 1),
                      product_dtype(), scaled_x, static_cast<Row*>(rows), any_rescaled},
                     nullptr));
  }

  void inverse_norms() {
    const Matrix weight = matrix("weight");
    auto* exponents = static_cast<int32_t*>(result("exponents", 'i', {weight.rows}));
    auto* any_rescaled = static_cast<int32_t*>(result("any_rescaled", 'i', {1}));
    *any_rescaled = 0;
    check(inverse_norms_cuda(
        {is_double(), weight, result("inverse_norms", real(), {weight.rows}), exponents, any_rescaled}, nullptr));
  }

  void rescaled_products() {
    void* products = shifted("products", changed("products"));
    check(rescaled_products_cuda(
        {is_double(), matrix("x"), matrix("weight"), exponents(), products, integer("row_stride", 0)}, nullptr));
  }

  void rescaled_gradients() {
    const int32_t any = static_cast<int32_t>(integer("any_rescaled", 1));
    void* h = changed("h");
    check(rescaled_gradients_cuda({is_double(), matrix("weight"), exponents(), &any, integer("batch", 0),
                                   product_dtype(), h, integer("add", 0) != 0, changed("grad_x")},
                                  nullptr));
  }

  void own_gradients(const char* (*launch)(const OwnGradientsParams&, simt::Stream)) {
    check(launch({is_double(), matrix("x"), matrix("weight"), integer("first", 0), rows(),
                  static_cast<const double*>(needed("own").data()), changed("grad")},
                 nullptr));
  }

  void forward_chunk() {
    void* products = changed("products");
    Row* rows = static_cast<Row*>(changed("rows"));
    const ForwardChunkParams params{chunk(),
                                    shifted("products", products),
                                    integer("row_stride", 0),
                                    integer("keep_cosines", 1) != 0,
                                    integer("smoothing", 0) != 0,
                                    given("class_weight"),
                                    rows};
    const Array workspace = take_workspace(forward_chunk_workspace(params));
    check(forward_chunk_cuda(params, workspace.data(), nullptr));
  }

  void loss() {
    void* loss = result("loss", real(), {integer("batch", 0)});
    check(loss_cuda({is_double(), integer("batch", 0), loss_settings(), rows(), loss}, nullptr));
  }

  void backward_chunk() {
    const Chunk c = chunk();
    void* products = changed("products");
    void* out = integer("in_place", 0) != 0 ? products : result("out", type_of(product_dtype()), {c.batch, c.classes});
    check(
        backward_chunk_cuda({c, loss_settings(), shifted("products", products), integer("row_stride", 0),
                             integer("are_cosines", 0) != 0, given("grad_loss"), rows(), product_dtype(), out, own(c)},
                            nullptr));
  }

  void logits() {
    void* products = shifted("products", changed("products"));
    check(logits_cuda({chunk(), products, integer("row_stride", 0), rows()}, nullptr));
  }

  void logits_backward() {
    const Chunk c = chunk();
    void* out = result("out", type_of(product_dtype()), {c.batch, c.classes});
    check(logits_backward_cuda({c, given("grad_logits"), integer("row_stride", 0), integer("col_stride", 1), rows(),
                                product_dtype(), out, own(c)},
                               nullptr));
  }

  void project() {
    void* grad = changed("grad");
    const std::vector<int64_t>& shape = needed("grad").shape;
    void* out = integer("in_place", 0) != 0 ? grad : result("out", real(), shape);
    const Row* of_x = given("rows") == nullptr ? nullptr : rows();
    check(project_cuda({is_double(), shape[0], shape[1], grad, matrix("v"), given("inverse_norms"),
                        static_cast<const int32_t*>(given("exponents")), of_x, out},
                       nullptr));
  }

  static constexpr int64_t row_size = sizeof(Row) / sizeof(double);
  const int32_t* exponents() const { return static_cast<const int32_t*>(needed("exponents").data()); }
  // Of rows that are not aligned, whatever the kernel leaves there.
  double* own(const Chunk& c) {
    auto* of_rows = static_cast<double*>(result("own", 'd', {c.batch}));
    for (int64_t b = 0; b < c.batch; ++b) of_rows[b] = 0;
    return of_rows;
  }
  bool is_double() const { return integer("is_double", 0) != 0; }
  char real() const { return is_double() ? 'd' : 'f'; }
  DType product_dtype() const { return static_cast<DType>(integer("product_dtype", 0)); }
  static char type_of(DType dtype) { return dtype == DType::float64 ? 'd' : dtype == DType::float32 ? 'f' : 'H'; }
  const Row* rows() const { return static_cast<const Row*>(needed("rows").data()); }

  // NAME, with NAME_layout: dtype, rows, columns, stride of rows, and how many elements lie before the first.
  Matrix matrix(const std::string& name) const {
    const Array& array = needed(name);
    const int64_t* layout = static_cast<const int64_t*>(needed(name + "_layout").data());
    const char* data = static_cast<const char*>(array.data()) + static_cast<size_t>(layout[4]) * bytes_of(array.type);
    return {data, static_cast<DType>(layout[0]), layout[1], layout[2], layout[3]};
  }
  Chunk chunk() const {
    return {is_double(),         integer("batch", 0), integer("classes", 0),
            integer("first", 0), number("scale", 1),  shifted("inverse_norms", needed("inverse_norms").data())};
  }
  LossSettings loss_settings() const {
    return {number("scale", 1), number("label_smoothing", 0), given("class_weight"),
            static_cast<const double*>(given("weight_sum")), integer("num_classes", 0)};
  }
  // The array's first element; NAME_offset of them lie before it.
  void* shifted(const std::string& name, void* data) const {
    return static_cast<char*>(data) + bytes_of(needed(name).type) * static_cast<size_t>(integer(name + "_offset", 0));
  }
  // A copy among the results, for a kernel that works in place.
  void* changed(const std::string& name) {
    const Array& array = needed(name);
    void* copy = result(name, array.type, array.shape);
    std::memcpy(copy, arguments_.at(name).data(), array.bytes);
    return copy;
  }
};

}  // namespace

Arrays run_margin_case(const Arrays& arguments) { return MarginCase(arguments).run(); }

}  // namespace otface::test
