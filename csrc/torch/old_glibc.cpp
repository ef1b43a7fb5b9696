// See old_glibc.h. With glibc 2.32 came a variable by which the standard library's shared_ptr may do without atomic
// operations in a process of one thread. This definition is hidden in our library and says that there may be more.
extern "C" {
char __libc_single_threaded = 0;
}
