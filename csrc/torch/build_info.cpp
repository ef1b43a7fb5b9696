// torch.ops.otface.build_info(): what the library knows about itself, read by otface_cuda/_build.py.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/cpu_isa.h"
#ifdef OTFACE_WITH_CUDA
#include "common/build_info.h"
#endif

namespace {

// One `key=value` per line.
std::string build_info() {
  std::string text;
  const auto add = [&text](const char* key, const std::string& value) { text += key + ("=" + value + "\n"); };
  add("built_for", OTFACE_BUILT_FOR);
  add("built_with", OTFACE_BUILT_WITH);
#ifdef OTFACE_WITH_CUDA
  add("cuda", std::to_string(otface::cuda_toolkit_version()));
  add("cuda_architectures", otface::cuda_architectures());
#endif
  std::string supported;
  for (const otface::Isa isa : otface::kEveryIsa) {
    if (otface::cpu_isa_supported(isa))
      supported += (supported.empty() ? "" : ",") + std::string(otface::cpu_isa_name(isa));
  }
  add("cpu_isa_supported", supported);
  add("cpu_isa", otface::cpu_isa_name(otface::cpu_isa()));
  add("cpu_isa_error", otface::cpu_isa_error());
  return text;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(otface, m) { m.def("build_info() -> str"); }

// There is no tensor among the arguments to tell a device, so the implementation is for all of them.
STABLE_TORCH_LIBRARY_IMPL(otface, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }
