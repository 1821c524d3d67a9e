// A 2:4 sparse weight as a dense one, for GPUs without wgmma and for sizes that it does not have.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastattn {

struct Sparse24ToDenseParams {
  const void* stored = nullptr;        // (N, K / 2), rows contiguous
  const uint32_t* metadata = nullptr;  // as GemmSm90SparseParams has it
  void* dense = nullptr;               // (N, K), rows contiguous
  int64_t stored_stride = 0, dense_stride = 0;
  int64_t n = 0, k = 0;   // k a multiple of 4
  int element_bytes = 2;  // 1 or 2
};

// Needs N > 0 and K > 0.
cudaError_t sparse_24_to_dense(const Sparse24ToDenseParams& params, cudaStream_t stream);

}  // namespace fastattn
