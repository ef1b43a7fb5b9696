#include "common/cpu_isa.h"

#include <cstdlib>
#include <string>

namespace otface {
namespace {

struct Choice {
  Isa isa = Isa::baseline;
  std::string error;
};

Choice choose() {
  Choice choice;
  std::string supported;
  for (const Isa isa : kEveryIsa) {
    if (!cpu_isa_supported(isa)) continue;
    choice.isa = isa;
    supported += (supported.empty() ? "" : ", ") + std::string(cpu_isa_name(isa));
  }
  const char* asked = std::getenv("OTFACE_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return choice;
  for (const Isa isa : kEveryIsa) {
    if (cpu_isa_supported(isa) && std::string(asked) == cpu_isa_name(isa)) return {isa, ""};
  }
  choice.error =
      "the environment variable OTFACE_CPU_ISA is '" + std::string(asked) + "'; this processor supports: " + supported;
  return choice;
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

const char* cpu_isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::baseline: break;
  }
  return "baseline";
}

bool cpu_isa_supported(Isa isa) {
  if (isa == Isa::baseline) return true;
#if defined(__x86_64__) && defined(__GNUC__)
  // These also ask the operating system whether it saves the wide registers.
  if (isa == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

Isa cpu_isa() { return chosen().isa; }

const char* cpu_isa_error() { return chosen().error.c_str(); }

}  // namespace otface
