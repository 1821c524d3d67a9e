// out = x weight^T + bias for sm_80 and later. The kernels are in gemm_sm80.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "gemm/gemm_sm80_config.h"

namespace fastattn {

// Strides count elements. Rows (the last dimension) are contiguous.
struct GemmSm80Params {
  const void* x = nullptr;       // (M, K)
  const void* weight = nullptr;  // (N, K)
  const void* bias = nullptr;    // (N) or nullptr
  void* out = nullptr;           // (M, N) contiguous
  float* workspace = nullptr;    // (splits, M, N) if config.num_splits > 1

  int64_t m = 0, n = 0, k = 0;
  int64_t x_stride = 0;
  int64_t weight_stride = 0;

  DType dtype = DType::kBFloat16;
  GemmConfig config = {};  // from gemm_sm80_config
};

// Enqueues the kernel, and the sum of the splits if there are several. Needs M > 0 and N > 0; K may be 0.
// cudaErrorInvalidValue for a dtype that is not bfloat16 or float16.
cudaError_t gemm_sm80(const GemmSm80Params& params, cudaStream_t stream);

}  // namespace fastattn
