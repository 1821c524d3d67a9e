// From a run-time DType to a template argument.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "arch/dtype.h"

namespace fastattn {

// Calls f with a value of the element type (use decltype); cudaErrorInvalidValue for another one than bf16 and fp16.
template <typename F>
cudaError_t dispatch_half(DType dtype, F f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(__nv_bfloat16());
    case DType::kFloat16:
      return f(__half());
    default:
      return cudaErrorInvalidValue;
  }
}

// The same with fp32.
template <typename F>
cudaError_t dispatch_float(DType dtype, F f) {
  return dtype == DType::kFloat32 ? f(float()) : dispatch_half(dtype, f);
}

}  // namespace fastattn
