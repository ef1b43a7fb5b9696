// Element types that a cost matrix may have. Arithmetic is done in float or double only.
#pragma once

#include <cstdint>

namespace otface {

enum class DType : int32_t { float32, float64, float16, bfloat16 };

}  // namespace otface
