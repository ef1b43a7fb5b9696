// The operators on the CPU: the C++ kernels on torch's own threads.
#include "sinkhorn/launch.h"
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
};

}  // namespace
}  // namespace otface::binding

STABLE_TORCH_LIBRARY_IMPL(otface, CPU, m) { OTFACE_REGISTER_SINKHORN(m, otface::binding::Cpu); }
