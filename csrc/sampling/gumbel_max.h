// Sampling as an arg-max (gumbel_max.cuh), in two steps that a GEMM can take the first of. The kernels are in
// gumbel_max.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"

namespace fastattn {

constexpr int kGumbelPartSize = 4096;  // ids of a row that a CTA looks at

struct GumbelMaxParams {
  const void* logits = nullptr;        // (B, V), contiguous; gumbel_choices only
  const float* temperature = nullptr;  // (B); 0: greedy; gumbel_choices only
  const int64_t* seed = nullptr;       // (B); gumbel_choices only
  const int64_t* position = nullptr;   // (B); gumbel_choices only
  uint64_t* choices = nullptr;         // (B, num_parts): the best of each part of a row
  int32_t* token_ids = nullptr;        // (B); best_choices only
  float* scores = nullptr;             // (B); best_choices only
  int64_t num_rows = 0;                // B
  int64_t num_parts = 0;               // of gumbel_choices ceil(V / kGumbelPartSize)
  int32_t vocab_size = 0;              // V
  int32_t first_id = 0;                // of the first column, a multiple of 4
  DType dtype = DType::kFloat32;
};

// Each needs B > 0 and V > 0. Logits to choices; choices to tokens, -1 for a row with a NaN or without a finite logit.
cudaError_t gumbel_choices(const GumbelMaxParams& params, cudaStream_t stream);
cudaError_t best_choices(const GumbelMaxParams& params, cudaStream_t stream);

}  // namespace fastattn
