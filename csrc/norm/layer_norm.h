// out = (x - mean) / sqrt(var + eps) * weight + bias. The kernel is in layer_norm.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "arch/dtype.h"
#include "arch/rows.h"

namespace fastattn {

// Rows (the last dimension) are contiguous. In the order in which the kernel reads them.
struct LayerNormParams {
  const void* x = nullptr;  // (rows, N)
  Rows x_rows;
  const void* weight = nullptr;  // (N) or nullptr: ones
  const void* bias = nullptr;    // (N) or nullptr
  void* out = nullptr;           // (rows, N) contiguous
  int64_t row_size = 0;          // N
  float eps = 0.0f;
  DType dtype = DType::kBFloat16;
  int64_t num_rows = 0;
};

// Needs rows > 0 and N > 0. cudaErrorInvalidValue for a dtype that is not bf16 or fp16.
cudaError_t layer_norm(const LayerNormParams& params, cudaStream_t stream);

}  // namespace fastattn
