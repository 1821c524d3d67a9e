// Log-probabilities of the chosen and of the best tokens. The kernel is in token_logprobs.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"

namespace fastattn {

struct TokenLogprobsParams {
  const void* logits = nullptr;        // (B, V), rows contiguous
  const int32_t* token_ids = nullptr;  // (B), the chosen ones
  float* chosen = nullptr;             // (B)
  int32_t* rank = nullptr;             // (B), from 1
  float* top = nullptr;                // (B, num_top), highest first
  int32_t* top_ids = nullptr;          // (B, num_top)
  int64_t logits_stride = 0;           // elements
  int64_t num_rows = 0;                // B
  int32_t vocab_size = 0;              // V
  int32_t num_top = 0;                 // at most V
  DType dtype = DType::kFloat32;
};

// Needs B > 0 and V > 0. A chosen token outside the vocabulary gives NaN and rank 0.
cudaError_t token_logprobs(const TokenLogprobsParams& params, cudaStream_t stream);

}  // namespace fastattn
