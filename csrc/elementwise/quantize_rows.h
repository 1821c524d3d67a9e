// q = round(x / scale), scale = max|x| / (what q can hold) of each row, in int8 or e4m3, or of each group of columns of
// a row; or q = round(x / scale + zero_point), which has 0 and all of a row between -128 and 127. Of x itself, or of
// what gated_activation makes of it. The kernels are in quantize_rows.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "arch/dtype.h"
#include "arch/rows.h"
#include "elementwise/gated_activation.h"

namespace fastattn {

constexpr int kQuantizeGroup = 128;  // columns with a scale of their own

struct QuantizeRowsParams {
  const void* x = nullptr;        // (rows, N), rows contiguous; gated: (rows, 2N), gate, then up
  void* q = nullptr;              // (rows, N) contiguous, int8 or e4m3 as q_dtype says
  float* scale = nullptr;         // (rows), of groups (N / kQuantizeGroup rounded up, rows)
  int32_t* zero_point = nullptr;  // (rows), of quantize_rows_asymmetric
  Rows x_rows;
  int64_t num_rows = 0;
  int64_t row_size = 0;  // N
  int64_t num_sms = 0;   // where 0, no rows are taken in turns
  DType dtype = DType::kBFloat16;
  DType q_dtype = DType::kInt8;
  bool gated = false;
  Activation activation = Activation::kSilu;  // of gates
};

// Needs rows > 0; N may be 0. cudaErrorInvalidValue for an x that is not bf16 or fp16, a q that is not int8 or e4m3.
cudaError_t quantize_rows(const QuantizeRowsParams& params, cudaStream_t stream);

// The same with zero points, in int8 only.
cudaError_t quantize_rows_asymmetric(const QuantizeRowsParams& params, cudaStream_t stream);

// The same of groups, in e4m3 only. Needs rows > 0 and N > 0.
cudaError_t quantize_groups(const QuantizeRowsParams& params, cudaStream_t stream);

}  // namespace fastattn
