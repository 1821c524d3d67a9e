// Element types that kernels are compiled for. No CUDA header: params structs include this.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kInt8 };

}  // namespace fastattn
