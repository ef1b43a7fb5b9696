// The operators on CUDA: the current device and stream, and workspace from torch's allocator.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <sstream>

#include "margin/launch_cuda.h"
#include "pairs/launch_cuda.h"
#include "sinkhorn/launch_cuda.h"
#include "torch/margin_ops.h"
#include "torch/pair_ops.h"
#include "torch/sinkhorn_ops.h"

namespace otface::binding {
namespace {

using sinkhorn::BackwardParams;
using sinkhorn::ForwardParams;
using sinkhorn::KernelChoice;
using sinkhorn::Tier;

simt::Stream current_stream(const Tensor& on) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return static_cast<simt::Stream>(stream);
}

void check(const char* error) { STD_TORCH_CHECK(*error == 0, "otface_cuda: ", error); }

// launch(params, workspace, stream) with the memory that choice(params) asks for.
template <class Params, class Choose, class Launch>
void with_workspace(const Params& params, const Tensor& on, Choose choose, Launch launch) {
  STD_TORCH_CHECK(params.problems.n < (1 << 30) && params.problems.m < (1 << 30),
                  "cost must have fewer than 2^30 rows and columns");
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  const KernelChoice choice = choose(params, Tier::any);
  const Tensor workspace = make(on, true, ScalarType::Byte, {static_cast<int64_t>(choice.workspace_bytes)});
  check(launch(params, data(workspace), current_stream(on), Tier::any));
}

struct Cuda {
  static void forward(const ForwardParams& params, const Tensor& on) {
    with_workspace(params, on, sinkhorn::forward_choice, sinkhorn::forward_cuda);
  }
  static void envelope_backward(const BackwardParams& params, const Tensor& on) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    check(sinkhorn::envelope_backward_cuda(params, current_stream(on)));
  }
  static void unrolled_backward(const BackwardParams& params, const Tensor& on) {
    with_workspace(params, on, sinkhorn::unrolled_backward_choice, sinkhorn::unrolled_backward_cuda);
  }
  static void implicit_backward(const BackwardParams& params, const Tensor& on) {
    with_workspace(params, on, sinkhorn::implicit_backward_choice, sinkhorn::implicit_backward_cuda);
  }

  static void start(const margin::StartParams& params, const Tensor& on) { run(margin::start_cuda, params, on); }
  static void inverse_norms(const margin::NormsParams& params, const Tensor& on) {
    run(margin::inverse_norms_cuda, params, on);
  }
  static void rescaled_products(const margin::RescaledProductsParams& params, const Tensor& on) {
    run(margin::rescaled_products_cuda, params, on);
  }
  static void forward_chunk(const margin::ForwardChunkParams& params, const Tensor& on) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    const auto bytes = static_cast<int64_t>(margin::forward_chunk_workspace(params));
    const Tensor workspace = make(on, true, ScalarType::Byte, {bytes});
    check(margin::forward_chunk_cuda(params, data(workspace), current_stream(on)));
  }
  static void loss(const margin::LossParams& params, const Tensor& on) { run(margin::loss_cuda, params, on); }
  static void backward_chunk(const margin::BackwardChunkParams& params, const Tensor& on) {
    run(margin::backward_chunk_cuda, params, on);
  }
  static void logits(const margin::LogitsParams& params, const Tensor& on) { run(margin::logits_cuda, params, on); }
  static void logits_backward(const margin::LogitsBackwardParams& params, const Tensor& on) {
    run(margin::logits_backward_cuda, params, on);
  }
  // Whether there are rescaled classes is known to the device only: the kernel writes grad_x in any case.
  static bool rescaled_gradients(const margin::RescaledGradientsParams& params, const Tensor& on) {
    run(margin::rescaled_gradients_cuda, params, on);
    return true;
  }
  static void project(const margin::ProjectParams& params, const Tensor& on) { run(margin::project_cuda, params, on); }
  static void own_gradients_of_x(const margin::OwnGradientsParams& params, const Tensor& on) {
    run(margin::own_gradients_of_x_cuda, params, on);
  }
  static void own_gradients_of_weight(const margin::OwnGradientsParams& params, const Tensor& on) {
    run(margin::own_gradients_of_weight_cuda, params, on);
  }

  static void near_costs(const pairs::NearCostsParams& params, const Tensor& on) {
    run(pairs::near_costs_cuda, params, on);
  }
  static void far_weights(const pairs::FarWeightsParams& params, const Tensor& on) {
    run(pairs::far_weights_cuda, params, on);
  }
  static void near_gradient(const pairs::NearGradientParams& params, const Tensor& on) {
    run(pairs::near_gradient_cuda, params, on);
  }

  // out = a b, or out + a b. Half types are multiplied as they are and added up in float32.
  static void product(Tensor& out, const Tensor& a, const Tensor& b, bool add) {
    if (a.scalar_type() == out.scalar_type()) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_addmm_out(out.get(), out.get(), a.get(), b.get(), add ? 1 : 0, 1));
      return;
    }
    if (add) {
      Tensor summand = make(out, true, out.scalar_type(), {out.size(0), out.size(1)});
      product(summand, a, b, false);
      out = torch::stable::subtract(out, summand, -1);
      return;
    }
    std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                      torch::stable::detail::from(out.scalar_type()), torch::stable::detail::from(out)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes the reference that the call gave back
  }

 private:
  template <class Params>
  static void run(const char* (*launch)(const Params&, simt::Stream), const Params& params, const Tensor& on) {
    const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
    check(launch(params, current_stream(on)));
  }
};

// What otface_cuda.kernel_for shows, one `key=value` per line: the choice for `batch` problems of n x m on the current device.
std::string sinkhorn_kernel(std::string op, int64_t batch, int64_t n, int64_t m, bool is_double) {
  ForwardParams forward{};
  BackwardParams backward{};
  for (sinkhorn::Problems* problems : {&forward.problems, &backward.problems}) {
    problems->batch = batch;
    problems->n = n;
    problems->m = m;
    problems->is_double = is_double;
  }
  const KernelChoice choice = op == "forward"    ? sinkhorn::forward_choice(forward, Tier::any)
                              : op == "unrolled" ? sinkhorn::unrolled_backward_choice(backward, Tier::any)
                                                 : sinkhorn::implicit_backward_choice(backward, Tier::any);
  const char* tiers[] = {"none", "register", "shared", "stream"};
  const simt::Limits limits = simt::limits();
  std::ostringstream out;
  out << "tier=" << tiers[static_cast<int>(choice.tier)] << "\ntile_rows=" << choice.tile_rows
      << "\ntile_cols=" << choice.tile_cols << "\nthreads_per_problem=" << choice.threads_per_problem
      << "\nproblems_per_block=" << choice.problems_per_block << "\nblocks_per_problem=" << choice.blocks_per_problem
      << "\nregisters=" << choice.registers << "\nshared_bytes=" << choice.shared_bytes
      << "\nworkspace_bytes=" << choice.workspace_bytes << "\nshared_limit=" << limits.shared_bytes_per_block
      << "\nmultiprocessors=" << limits.multiprocessors << "\n";
  return out.str();
}

}  // namespace
}  // namespace otface::binding

STABLE_TORCH_LIBRARY_FRAGMENT(otface, m) {
  m.def("sinkhorn_kernel(str op, int batch, int n, int m, bool is_double) -> str");
}
STABLE_TORCH_LIBRARY_IMPL(otface, CompositeExplicitAutograd, m) {
  m.impl("sinkhorn_kernel", TORCH_BOX(&otface::binding::sinkhorn_kernel));
}
STABLE_TORCH_LIBRARY_IMPL(otface, CUDA, m) {
  OTFACE_REGISTER_SINKHORN(m, otface::binding::Cuda);
  OTFACE_REGISTER_MARGIN(m, otface::binding::Cuda);
  OTFACE_REGISTER_NEAR(m, otface::binding::Cuda);
}
