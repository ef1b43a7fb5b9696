// The operators on the CPU: the C++ kernels on torch's own threads.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "margin/launch.h"
#include "mining/hard_triplets.h"
#include "pairs/launch.h"
#include "sinkhorn/launch.h"
#include "torch/margin_ops.h"
#include "torch/mining_ops.h"
#include "torch/pair_ops.h"
#include "torch/sinkhorn_ops.h"

namespace otface::binding {
namespace {

// torch.set_num_threads is obeyed, because the tasks run on torch's own pool.
Executor torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t tasks, void (*body)(void*, int64_t), void* context) {
            torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
              for (int64_t task = begin; task < end; ++task) body(context, task);
            });
          }};
}

struct Cpu {
  static void forward(const sinkhorn::ForwardParams& params, const Tensor&) {
    sinkhorn::forward_cpu(params, torch_threads());
  }
  static void envelope_backward(const sinkhorn::BackwardParams& params, const Tensor&) {
    sinkhorn::envelope_backward_cpu(params, torch_threads());
  }
  static void unrolled_backward(const sinkhorn::BackwardParams& params, const Tensor&) {
    sinkhorn::unrolled_backward_cpu(params, torch_threads());
  }
  static void implicit_backward(const sinkhorn::BackwardParams& params, const Tensor&) {
    sinkhorn::implicit_backward_cpu(params, torch_threads());
  }

  static void start(const margin::StartParams& params, const Tensor&) { margin::start_cpu(params, torch_threads()); }
  static void inverse_norms(const margin::NormsParams& params, const Tensor&) {
    margin::inverse_norms_cpu(params, torch_threads());
  }
  static void rescaled_products(const margin::RescaledProductsParams& params, const Tensor&) {
    margin::rescaled_products_cpu(params, torch_threads());
  }
  static void forward_chunk(const margin::ForwardChunkParams& params, const Tensor&) {
    margin::forward_chunk_cpu(params, torch_threads());
  }
  static void loss(const margin::LossParams& params, const Tensor&) { margin::loss_cpu(params, torch_threads()); }
  static void backward_chunk(const margin::BackwardChunkParams& params, const Tensor&) {
    margin::backward_chunk_cpu(params, torch_threads());
  }
  static void logits(const margin::LogitsParams& params, const Tensor&) { margin::logits_cpu(params, torch_threads()); }
  static void logits_backward(const margin::LogitsBackwardParams& params, const Tensor&) {
    margin::logits_backward_cpu(params, torch_threads());
  }
  static bool rescaled_gradients(const margin::RescaledGradientsParams& params, const Tensor&) {
    return margin::rescaled_gradients_cpu(params, torch_threads());
  }
  static void project(const margin::ProjectParams& params, const Tensor&) {
    margin::project_cpu(params, torch_threads());
  }
  static void own_gradients_of_x(const margin::OwnGradientsParams& params, const Tensor&) {
    margin::own_gradients_of_x_cpu(params, torch_threads());
  }
  static void own_gradients_of_weight(const margin::OwnGradientsParams& params, const Tensor&) {
    margin::own_gradients_of_weight_cpu(params, torch_threads());
  }

  static int64_t count_hard(const mining::Batch& batch, int64_t* counts) {
    return mining::count_hard(batch, counts, torch_threads());
  }
  static void write_hard(const mining::Batch& batch, const int64_t* counts, int64_t* triplets, void* excess) {
    mining::write_hard(batch, counts, triplets, excess, torch_threads());
  }

  static void pack(const pairs::PackParams& params) { pairs::pack_cpu(params, torch_threads()); }
  static void pair_costs(const pairs::CostParams& params) { pairs::cost_cpu(params, torch_threads()); }
  static void pair_costs_backward(const pairs::GradientParams& params) { pairs::gradient_cpu(params, torch_threads()); }
  static void unpack_gradient(const pairs::UnpackParams& params) { pairs::unpack_cpu(params, torch_threads()); }

  static void near_costs(const pairs::NearCostsParams& params, const Tensor&) {
    pairs::near_costs_cpu(params, torch_threads());
  }
  static void far_weights(const pairs::FarWeightsParams& params, const Tensor&) {
    pairs::far_weights_cpu(params, torch_threads());
  }
  static void near_gradient(const pairs::NearGradientParams& params, const Tensor&) {
    pairs::near_gradient_cpu(params, torch_threads());
  }

  // out = a b, or out + a b
  static void product(Tensor& out, const Tensor& a, const Tensor& b, bool add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), add ? 1 : 0, 1));
  }
};

}  // namespace
}  // namespace otface::binding

STABLE_TORCH_LIBRARY_IMPL(otface, CPU, m) {
  OTFACE_REGISTER_SINKHORN(m, otface::binding::Cpu);
  OTFACE_REGISTER_MARGIN(m, otface::binding::Cpu);
  OTFACE_REGISTER_MINING(m, otface::binding::Cpu);
  OTFACE_REGISTER_PAIRS(m, otface::binding::Cpu);
  OTFACE_REGISTER_NEAR(m, otface::binding::Cpu);
}
