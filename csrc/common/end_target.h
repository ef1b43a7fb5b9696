// See begin_avx2.h and begin_avx512.h. For GCC the target lasts to the end of the file.
#if defined(__clang__)
#pragma clang attribute pop
#endif
