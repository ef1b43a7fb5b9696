// The only file that nvcc's own macros can be read in: what this build was compiled for.
#include <cuda_runtime_api.h>

#include "common/build_info.h"

#define OTFACE_STRING(...) #__VA_ARGS__
#define OTFACE_EXPANDED_STRING(...) OTFACE_STRING(__VA_ARGS__)

namespace otface {

const char* cuda_architectures() { return OTFACE_EXPANDED_STRING(__CUDA_ARCH_LIST__); }

int cuda_toolkit_version() { return CUDART_VERSION; }

}  // namespace otface
