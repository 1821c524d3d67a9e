// q = round(x / scale), scale = max|x| / 127 of each row. The kernel is in quantize_int8.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "arch/dtype.h"
#include "arch/rows.h"

namespace fastattn {

struct QuantizeInt8Params {
  const void* x = nullptr;  // (rows, N), rows contiguous
  int8_t* q = nullptr;      // (rows, N) contiguous
  float* scale = nullptr;   // (rows)
  Rows x_rows;
  int64_t num_rows = 0;
  int64_t row_size = 0;  // N
  DType dtype = DType::kBFloat16;
};

// Needs rows > 0; N may be 0. cudaErrorInvalidValue for a dtype that is not bf16 or fp16.
cudaError_t quantize_int8(const QuantizeInt8Params& params, cudaStream_t stream);

}  // namespace fastattn
