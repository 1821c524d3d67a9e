// Adds up attention results over parts of the keys.
//
//   out[t, h, :] = sum_s w_s partial_out[s, t, h, :] / sum_s w_s,   w_s = exp(lse_s - max_s lse_s)
//   lse[h, t]    = max_s lse_s + log sum_s w_s
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"

namespace fastattn {

struct FlashCombineParams {
  const float* partial_out;  // (splits, T, H, D); not read where the LSE is -inf
  const float* partial_lse;  // (splits, H, T)
  void* out;                 // (T, H, D)
  float* lse;                // (H, T)
  int64_t num_tokens;
  int32_t num_splits, num_heads, head_dim;
  DType dtype;  // of out
};

cudaError_t flash_combine(const FlashCombineParams& params, cudaStream_t stream);

}  // namespace fastattn
