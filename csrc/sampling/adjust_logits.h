// Penalties and biases of the touched tokens, in place. The kernel is in adjust_logits.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastattn {

struct AdjustLogitsParams {
  float* logits = nullptr;                    // (B, V), rows contiguous, changed in place
  const int32_t* token_ids = nullptr;         // (nnz), each token at most once a row
  const int32_t* counts = nullptr;            // (nnz) occurrences in the output; 0: prompt only; -1: biased only
  const float* bias = nullptr;                // (nnz)
  const int32_t* indptr = nullptr;            // (B + 1), ascending from 0 to nnz
  const float* repetition_penalty = nullptr;  // (B) > 0
  const float* presence_penalty = nullptr;    // (B)
  const float* frequency_penalty = nullptr;   // (B)
  int64_t logits_stride = 0;                  // elements
  int64_t num_rows = 0;                       // B
  int64_t vocab_size = 0;                     // V
  int64_t nnz = 0;
};

// Needs B > 0. Tokens outside the vocabulary, and entries past nnz, are left out.
cudaError_t adjust_logits(const AdjustLogitsParams& params, cudaStream_t stream);

}  // namespace fastattn
