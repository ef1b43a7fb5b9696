// What follows this file is compiled for AVX2, until end_target.h. The standard headers come first: an inline function
// of theirs, compiled for AVX2, must not be the copy that the linker keeps for every machine.
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
