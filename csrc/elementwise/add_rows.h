// Rows added to those of a product, in place, and sums of the results' squares. The kernel is in add_rows.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "arch/rows.h"

namespace fastattn {

struct AddRowsParams {
  void* out = nullptr;         // (M, N), contiguous
  const void* rows = nullptr;  // (M, N)
  Rows of_rows;                // where its rows begin
  float* squares = nullptr;    // (M, N / 32 rounded up) or nullptr: sums over 32 columns of a row
  int64_t num_rows = 0;        // M
  int64_t row_size = 0;        // N
  DType dtype = DType::kBFloat16;
};

// out = round(out + rows). Needs M > 0 and N > 0, M below 2^31. cudaErrorInvalidValue for another dtype than bf16 and
// fp16.
cudaError_t add_rows(const AddRowsParams& params, cudaStream_t stream);

}  // namespace fastattn
