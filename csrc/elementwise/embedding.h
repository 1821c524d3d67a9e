// out = weight[token_ids] * scale; an id t < 0 stands for drawn[−1 − t]. The kernel is in embedding.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "arch/dtype.h"
#include "arch/rows.h"

namespace fastattn {

struct EmbeddingParams {
  const int32_t* token_ids = nullptr;  // (T)
  const int32_t* drawn = nullptr;      // (R); null if R is 0
  const void* weight = nullptr;        // (V, N), rows contiguous
  void* out = nullptr;                 // (T, N) contiguous
  int64_t weight_stride = 0;           // elements
  int64_t num_tokens = 0;
  int64_t num_drawn = 0;  // R
  int64_t vocab_size = 0;
  int64_t width = 0;  // N
  float scale = 1.0f;
  DType dtype = DType::kBFloat16;
};

// Needs T > 0 and N > 0. An id outside the vocabulary gives a row of zeros. cudaErrorInvalidValue for a dtype that is
// not bf16 or fp16.
cudaError_t embedding(const EmbeddingParams& params, cudaStream_t stream);

}  // namespace fastattn
