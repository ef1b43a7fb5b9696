// The CPU kernels for AVX2. The standard headers come before the target: an inline function of theirs, compiled for
// AVX2, must not be the copy that the linker keeps for every machine.
#if defined(__x86_64__)
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif
#define OTFACE_VEC_BYTES 32
#define OTFACE_CPU_TABLE cpu_kernels_avx2
#include "margin/cpu_kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
