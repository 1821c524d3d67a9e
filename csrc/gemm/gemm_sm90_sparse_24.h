// out = x weight^T + bias with a weight that is 2:4 sparse, for Hopper (wgmma.mma_async.sp): of each four neighbours in
// a row two at most are not zero, and two are stored. The kernel is in gemm_sm90_sparse_24.cuh.
#pragma once

#include "gemm/gemm_sm90.h"
#include "gemm/gemm_sm90_sparse_24_config.h"

namespace fastattn {

// As GemmSm90Params, but that `weight` is (N, K / 2), the elements stored, and config from gemm_sm90_sparse_config.
struct GemmSm90SparseParams : GemmSm90Params {
  // (N / 128 rounded up, K / 512 rounded up * 8, 256): what wgmma wants of each thread of two warp groups for 128 rows
  // and 64 columns (arch/wgmma_sparse.cuh), 16-byte aligned. Padding is any valid metadata, as 0x44444444.
  const uint32_t* metadata = nullptr;
};

// Each enqueues the kernel. Needs M > 0 and N > 0, K a multiple of 4. cudaErrorInvalidValue if no instantiation fits.
cudaError_t gemm_sparse_sm90(const GemmSm90SparseParams& params, cudaStream_t stream);
cudaError_t gemm_sparse_int8_sm90(const GemmSm90SparseParams& params, cudaStream_t stream);  // K < 2^17
cudaError_t gemm_sparse_fp8_sm90(const GemmSm90SparseParams& params, cudaStream_t stream);

}  // namespace fastattn
