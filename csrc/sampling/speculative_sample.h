// One token for each row of logits, the draft's where the rejection rule allows. The kernel is in
// speculative_sample.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "sampling/sample.h"

namespace fastattn {

struct SpeculativeSampleParams {
  SampleParams target;                       // p, the limits of both distributions, and the result
  const void* draft_logits = nullptr;        // (D, V), rows contiguous, the target's dtype
  const int32_t* draft_token_ids = nullptr;  // (B)
  const int32_t* draft_rows = nullptr;       // (B), row of draft_logits; outside 0 ... D - 1: no draft
  int64_t draft_stride = 0;                  // elements
  int64_t num_draft_rows = 0;                // D
};

// Needs B > 0 and 0 < V <= kSampleMaxVocab. -1 for a row with a NaN, or without a finite logit.
cudaError_t speculative_sample(const SpeculativeSampleParams& params, cudaStream_t stream);

}  // namespace fastattn
