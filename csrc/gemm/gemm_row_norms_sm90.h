// What norms of many rows need before the product: gemm_row_norms_sm90.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm/gemm_sm90.h"

namespace fastattn {

// Writes params.row_norms, of RMSNorm (by x_squares where they are given) or LayerNorm. The product that is enqueued
// right behind it may begin before it has ended.
cudaError_t gemm_row_norms_sm90(const GemmSm90Params& params, GemmSm90Norm norm, cudaStream_t stream);

}  // namespace fastattn
