// The CPU kernels for the least instruction set of the platform (SSE2 on x86-64, NEON on 64-bit Arm).
#define OTFACE_VEC_BYTES 16
#define OTFACE_CPU_TABLE cpu_kernels_baseline
#include "pairs/cpu_kernels.h"
