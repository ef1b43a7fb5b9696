#include "case.h"

#include <limits>
#include <stdexcept>

#include "common/simt.h"
#include "named_arrays.h"
#include "sinkhorn/launch_cuda.h"

namespace otface::test {

using simt::executor::settings;
using sinkhorn::BackwardParams;
using sinkhorn::ForwardParams;
using sinkhorn::KernelChoice;
using sinkhorn::Problems;
using sinkhorn::Tier;

namespace {

class Case : NamedArrays {
 public:
  explicit Case(const Arrays& arguments) : NamedArrays(arguments) {
    settings.limits.multiprocessors = static_cast<int>(integer("multiprocessors", 2));
    settings.blocks_per_multiprocessor = static_cast<int>(integer("blocks_per_multiprocessor", 32));
    settings.limits.shared_bytes_per_block = static_cast<int>(integer("shared_bytes_per_block", 227 << 10));
    settings.limits.workspace_bytes = integer("workspace_bytes", int64_t{2} << 30);
    tier_ = static_cast<Tier>(integer("tier", 0));
    problems_ = read_problems();
  }

  Arrays run() {
    if (integer("forward", 0) != 0) forward();
    if (integer("envelope", 0) != 0) backward(Gradient::envelope);
    if (integer("unrolled", 0) != 0) backward(Gradient::unrolled);
    if (integer("implicit", 0) != 0) backward(Gradient::implicit);
    return std::move(results_);
  }

 private:
  enum class Gradient { envelope, unrolled, implicit };

  void forward() {
    const Problems& p = problems_;
    ForwardParams params{};
    params.problems = p;
    params.init_g = given("init_g");
    params.tol = static_cast<const double*>(given("tol"));
    params.tol_stride = stride_of("tol");
    params.max_iter = integer("max_iter", 1);
    params.check_every = integer("check_every", 10);
    params.value = result("value", real_, {p.batch});
    params.transport_cost = result("transport_cost", real_, {p.batch});
    params.f = result("f", real_, {p.batch, p.n});
    params.g = result("g", real_, {p.batch, p.m});
    if (integer("want_plan", 0) != 0) params.plan = result("plan", real_, {p.batch, p.n, p.m});
    params.error = result("error", real_, {p.batch});
    params.n_iter = static_cast<int64_t*>(result("n_iter", 'l', {p.batch}));
    params.converged = static_cast<bool*>(result("converged", 'B', {p.batch}));
    params.potentials = static_cast<double*>(result("potentials", 'd', {p.batch, p.n + p.m}));
    if (integer("want_history", 0) != 0) {
      params.history.max_iter = params.max_iter;
      params.history.slot = p.m + std::max(p.n, p.m);
      params.history.slots = result("history", real_, {p.batch, params.max_iter, params.history.slot});
      params.history.rebuilt = static_cast<uint8_t*>(result("rebuilt", 'B', {p.batch, params.max_iter}));
    }
    const KernelChoice choice = forward_choice(params, tier_);
    tell("forward_choice", choice);
    const Array workspace = take_workspace(choice.workspace_bytes);
    check(forward_cuda(params, workspace.data(), nullptr, tier_));
  }

  void backward(Gradient gradient) {
    const Problems& p = problems_;
    BackwardParams params{};
    params.problems = p;
    params.potentials = static_cast<const double*>(needed("potentials").data());
    params.grad_value = given("grad_value");
    params.grad_transport_cost = given("grad_transport_cost");
    params.grad_f = given("grad_f");
    params.grad_g = given("grad_g");
    params.grad_plan = given("grad_plan");
    if (gradient == Gradient::unrolled) {
      params.n_iter = static_cast<const int64_t*>(needed("n_iter").data());
      const Array& history = needed("history");
      params.history = {history.data(), static_cast<uint8_t*>(needed("rebuilt").data()), history.shape[1],
                        history.shape[2]};
    }
    params.tol = number("implicit_tol", 1e-6);
    params.max_iter = integer("implicit_max_iter", 2 * (p.n + p.m));
    if (integer("want_grad_cost", 1) != 0) params.grad_cost = result("grad_cost", real_, {p.batch, p.n, p.m});
    if (integer("want_grad_a", 1) != 0) params.grad_a = result("grad_a", real_, {p.batch, p.n});
    if (integer("want_grad_b", 1) != 0) params.grad_b = result("grad_b", real_, {p.batch, p.m});
    if (gradient == Gradient::implicit) {
      params.converged = static_cast<bool*>(result("implicit_converged", 'B', {p.batch}));
    }
    if (gradient == Gradient::envelope) return check(envelope_backward_cuda(params, nullptr));
    const bool is_unrolled = gradient == Gradient::unrolled;
    const KernelChoice choice =
        is_unrolled ? unrolled_backward_choice(params, tier_) : implicit_backward_choice(params, tier_);
    tell(is_unrolled ? "unrolled_choice" : "implicit_choice", choice);
    const Array workspace = take_workspace(choice.workspace_bytes);
    check(is_unrolled ? unrolled_backward_cuda(params, workspace.data(), nullptr, tier_)
                      : implicit_backward_cuda(params, workspace.data(), nullptr, tier_));
  }

  Problems read_problems() {
    Problems p{};
    const Array& cost = needed("cost");
    p.is_double = cost.type == 'd';
    real_ = p.is_double ? 'd' : 'f';
    p.batch = integer("batch", 0);
    p.n = integer("n", 0);
    p.m = integer("m", 0);
    p.cost.dtype = cost.type == 'd'                 ? DType::float64
                   : cost.type == 'f'               ? DType::float32
                   : integer("cost_bfloat", 0) != 0 ? DType::bfloat16
                                                    : DType::float16;
    p.cost.data = static_cast<const char*>(cost.data()) + bytes_of(cost.type) * integer("cost_offset", 0);
    const int64_t* strides = static_cast<const int64_t*>(needed("cost_strides").data());
    p.cost.batch_stride = strides[0];
    p.cost.row_stride = strides[1];
    p.cost.col_stride = strides[2];
    p.a = read_weights("a");
    p.b = read_weights("b");
    p.eps = static_cast<const double*>(needed("eps").data());
    p.eps_stride = stride_of("eps");
    p.mass_tolerance = number("mass_tolerance", std::numeric_limits<double>::infinity());
    p.row_lengths = static_cast<const int64_t*>(given("row_lengths"));
    p.col_lengths = static_cast<const int64_t*>(given("col_lengths"));
    return p;
  }

  sinkhorn::WeightsView read_weights(const std::string& name) const {
    if (given(name) == nullptr) return {};
    const int64_t* strides = static_cast<const int64_t*>(needed(name + "_strides").data());
    return {given(name), strides[0], strides[1]};
  }

  int64_t stride_of(const std::string& name) const { return needed(name).shape[0] == 1 ? 0 : 1; }

  void tell(const std::string& name, const KernelChoice& choice) {
    const int64_t values[] = {static_cast<int64_t>(choice.tier),
                              choice.tile_rows,
                              choice.tile_cols,
                              choice.threads_per_problem,
                              choice.problems_per_block,
                              choice.blocks_per_problem,
                              static_cast<int64_t>(choice.shared_bytes),
                              static_cast<int64_t>(choice.workspace_bytes)};
    std::memcpy(result(name, 'l', {8}), values, sizeof(values));
  }
  Problems problems_;
  char real_ = 'f';
  Tier tier_;
};

}  // namespace

Array::Array(char type_, std::vector<int64_t> shape_) : type(type_), shape(std::move(shape_)) {
  bytes = bytes_of(type);
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  void* p = nullptr;
  if (posix_memalign(&p, 256, bytes) != 0) throw std::bad_alloc();
  data_.reset(p);
}

Arrays run_case(const Arrays& arguments) {
  if (arguments.count("margin_step") != 0) return run_margin_case(arguments);
  if (arguments.count("near_step") != 0) return run_near_case(arguments);
  return Case(arguments).run();
}

}  // namespace otface::test
