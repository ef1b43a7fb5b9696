// The CPU kernels for AVX2.
#if defined(__x86_64__)
#include "common/begin_avx2.h"
#define OTFACE_CPU_TABLE cpu_kernels_avx2
#include "pairs/cpu_kernels.h"
#undef OTFACE_CPU_TABLE
#include "common/end_target.h"
#endif
