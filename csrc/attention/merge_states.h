// Attention over two disjoint sets of keys, from the attention over each. The kernel is in merge_states.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"

namespace fastattn {

// One side. Strides are in elements; D of out and S of lse are contiguous.
struct AttentionState {
  const void* out = nullptr;   // (B, S, H, D)
  const float* lse = nullptr;  // (B, H, S), natural logarithm; -inf or +inf where no key was seen: out is not read
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  int64_t lse_batch_stride = 0;
  int64_t lse_head_stride = 0;
};

struct MergeStatesParams {
  AttentionState a, b;
  void* out = nullptr;   // (B, S, H, D) contiguous
  float* lse = nullptr;  // (B, H, S) contiguous
  int64_t batch = 0;
  int64_t num_rows = 0;  // S
  int32_t num_heads = 0;
  int32_t head_dim = 0;
  DType dtype = DType::kBFloat16;
};

// Needs every size > 0. cudaErrorInvalidValue for a dtype that is not bf16, fp16 or fp32.
cudaError_t merge_states(const MergeStatesParams& params, cudaStream_t stream);

}  // namespace fastattn
