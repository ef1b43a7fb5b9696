#pragma once

namespace otface {

// The instruction sets the CPU kernels are compiled for, slowest first. Outside x86-64 there is only `baseline`.
enum class Isa { baseline, avx2, avx512 };
inline constexpr Isa kEveryIsa[] = {Isa::baseline, Isa::avx2, Isa::avx512};

// "baseline", "avx2" or "avx512": the values of the environment variable OTFACE_CPU_ISA.
const char* cpu_isa_name(Isa isa);

// Whether this processor can run kernels of that instruction set.
bool cpu_isa_supported(Isa isa);

// The instruction set to use: the fastest supported one, or the one OTFACE_CPU_ISA asks for. Chosen at the first call
// and fixed from then on, so that one process never mixes the rounding of two instruction sets.
Isa cpu_isa();

// One sentence if OTFACE_CPU_ISA asks for something this processor does not have (cpu_isa() then ignores it), else "".
// A string and not an exception, because it is asked for while the library loads; the Python import raises it.
const char* cpu_isa_error();

#if defined(__x86_64__)
// Of a family's tables of kernels, the one for the instruction set in use.
template <class Table>
const Table& for_this_cpu(const Table& baseline, const Table& avx2, const Table& avx512) {
  switch (cpu_isa()) {
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    case Isa::baseline: break;
  }
  return baseline;
}
#endif

}  // namespace otface
