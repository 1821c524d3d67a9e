// out = x weight^T + bias in bf16 or fp16 for Hopper (wgmma, TMA). Two kernels: gemm_sm90.cuh, and for a few rows,
// which is mostly a matter of reading the weight, gemm_sm90_few_rows.cuh. Which one, and its tile: gemm_sm90_config.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "gemm/gemm_sm90_config.h"

namespace fastattn {

// T: bf16 or fp16, as dtype says. Strides count elements, multiples of 8; rows (the last dimension) are contiguous and
// 16-byte aligned.
struct GemmSm90Params {
  const void* x = nullptr;       // (M, K) T
  const void* weight = nullptr;  // (N, K) T
  const void* bias = nullptr;    // (N) T or nullptr
  void* out = nullptr;           // (M, N) T, contiguous

  int64_t m = 0, n = 0, k = 0;  // each below 2^31; k > 0; n a multiple of 8
  int64_t x_stride = 0;
  int64_t weight_stride = 0;

  DType dtype = DType::kBFloat16;
  GemmSm90Config config = {};  // from gemm_sm90_config
};

// Enqueues the kernel. Needs M > 0 and N > 0. cudaErrorInvalidValue if no instantiation fits.
cudaError_t gemm_sm90(const GemmSm90Params& params, cudaStream_t stream);

}  // namespace fastattn
