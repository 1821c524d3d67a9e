// out = rms_norm(x) * weight, or residual += x and out = rms_norm(residual) * weight; in x's dtype, or that in 8 bits
// with a scale a row, as quantize_rows makes them. The kernel is in rms_norm.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "arch/dtype.h"
#include "arch/rows.h"

namespace fastattn {

// Rows (the last dimension) are contiguous. In the order in which the kernel reads them.
struct RmsNormParams {
  const void* x = nullptr;  // (rows, N)
  Rows x_rows;
  void* residual = nullptr;  // (rows, N), changed in place; nullptr: the plain norm
  Rows residual_rows;
  const void* weight = nullptr;  // (N) or nullptr: ones
  void* out = nullptr;           // (rows, N) contiguous; in dtype, with a scale in q_dtype
  float* scale = nullptr;        // (rows), of an out in 8 bits; nullptr: it is not
  int64_t row_size = 0;          // N
  float eps = 0.0f;
  DType dtype = DType::kBFloat16;
  DType q_dtype = DType::kInt8;  // or e4m3
  int64_t num_rows = 0;
};

// Needs rows > 0, and N > 0 but for 8 bits. cudaErrorInvalidValue for a dtype that is not bf16 or fp16, a q_dtype that
// is not int8 or e4m3.
cudaError_t rms_norm(const RmsNormParams& params, cudaStream_t stream);

}  // namespace fastattn
