// Adds up attention results over parts of the keys.
//
//   out[t, h, :] = sum_s w_s partial_out[s, t, h, :] / sum_s w_s,   w_s = exp(lse_s - max_s lse_s)
//   lse          = max_s lse_s + log sum_s w_s
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"

namespace fastattn {

struct FlashCombineParams {
  const float* partial_out;  // (splits, T, H, D); not read where the LSE is -inf
  const float* partial_lse;  // (splits, T / n, H, n)
  void* out;                 // (T, H, D)
  float* lse;                // (T / n, H, n)
  int64_t num_tokens;        // T
  int64_t lse_tokens;        // n: T for packed sequences, their length for a batch
  int32_t num_splits, num_heads, head_dim;
  DType dtype;                       // of out, but
  const float* out_scale = nullptr;  // with it (1) out is e4m3, of what it would be divided by that
};

cudaError_t flash_combine(const FlashCombineParams& params, cudaStream_t stream);

}  // namespace fastattn
