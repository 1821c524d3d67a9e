// Forbids tokens by a bit each, in place. The kernel is in apply_token_bitmask.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fastattn {

struct ApplyTokenBitmaskParams {
  float* logits = nullptr;           // (B, V), rows contiguous, changed in place
  const int32_t* bitmask = nullptr;  // (R, ceil(V / 32)), rows contiguous; the lowest bit of a word is its first token
  const int32_t* rows = nullptr;     // (R), which row of logits each mask is for
  int64_t logits_stride = 0;         // elements
  int64_t bitmask_stride = 0;        // elements
  int64_t num_rows = 0;              // B
  int64_t num_masks = 0;             // R
  int64_t vocab_size = 0;            // V
};

// Needs R > 0 and V > 0. A mask for a row that is none is left out.
cudaError_t apply_token_bitmask(const ApplyTokenBitmaskParams& params, cudaStream_t stream);

}  // namespace fastattn
