// Put before every C++ file by setup.py: what is compiled here shall load wherever torch's own wheels do, which need glibc
// 2.28. Newer ones gave these functions a second version, which the linker would take; both compute the same.
#if defined(__x86_64__) && __has_include(<gnu/libc-version.h>)
__asm__(".symver exp, exp@GLIBC_2.2.5");      // 2.29: without the wrapper that sets errno the old way
__asm__(".symver log, log@GLIBC_2.2.5");      // 2.29: the same
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");  // 2.34: moved from libdl, which Python and torch have loaded
#endif
