// One token for each row of logits. The kernel is in sample.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"

namespace fastattn {

struct SampleParams {
  const void* logits = nullptr;        // (B, V), rows contiguous
  const float* temperature = nullptr;  // (B); 0: greedy
  const int32_t* top_k = nullptr;      // (B); <= 0: off
  const float* top_p = nullptr;        // (B); 1: off
  const float* min_p = nullptr;        // (B); 0: off
  const int64_t* seed = nullptr;       // (B)
  const int64_t* position = nullptr;   // (B)
  int32_t* out = nullptr;              // (B)
  int64_t logits_stride = 0;           // elements
  int64_t num_rows = 0;                // B
  int32_t vocab_size = 0;              // V
  int32_t num_sms = 0;                 // on which the CTAs of a row are to run at a time; 0 where there are no clusters
  DType dtype = DType::kFloat32;
};

constexpr int64_t kSampleMaxVocab = int64_t{1} << 21;  // so that a sum of fixed-point weights fits 64 bits

// Needs B > 0 and 0 < V <= kSampleMaxVocab. -1 for a row with a NaN, or without a finite logit.
cudaError_t sample(const SampleParams& params, cudaStream_t stream);

}  // namespace fastattn
