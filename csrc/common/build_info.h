#pragma once

namespace otface {

// The architectures nvcc compiled for, as in its macro __CUDA_ARCH_LIST__: "800,900".
const char* cuda_architectures();

// The CUDART_VERSION compiled against: 13000 is CUDA 13.0.
int cuda_toolkit_version();

}  // namespace otface
