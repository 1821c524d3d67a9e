// Attention forward for sm_80 and later: out = softmax(mask(q k^T * scale)) v over packed sequences,
// with K and V contiguous (varlen) or in pages. The kernel is in flash_sm80.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "attention/attention_params.h"
#include "attention/flash_sm80_config.h"
#include "attention/section_order.h"

namespace fastattn {

struct FlashSm80Params : AttentionParams {
  // Packed only: of sequences of other lengths no result is given, other kernels have them.
  int32_t min_q_len = 0, max_q_len = INT32_MAX;

  // Workspaces: (splits, T, H, Dv) if config.num_splits > 1 or with out_scale, and (splits, *shape of lse) if > 1.
  float* partial_out = nullptr;
  float* partial_lse = nullptr;

  FlashSm80Config config = {};  // from flash_sm80_config
  SectionLookup order;          // of the CTAs, by flash_sm80_forward
};

// Enqueues the kernel, and the combination of the splits if there are several. Needs T > 0.
// cudaErrorInvalidValue if no instantiation fits: they are of bfloat16 and float16, with head dims up to 256.
cudaError_t flash_sm80_forward(const FlashSm80Params& params, cudaStream_t stream);

}  // namespace fastattn
