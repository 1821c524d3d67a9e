// Attention of a few query rows a KV head (decode, speculation) for sm_80 and later: out = softmax(mask(q k^T * scale))
// v with K and V in pages or contiguous. The kernel is in paged_decode.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include "arch/kv_scale.h"
#include "attention/attention_params.h"
#include "attention/paged_decode_config.h"

namespace fastattn {

struct PagedDecodeParams : AttentionParams {
  DType kv_dtype = DType::kBFloat16;  // of k and v: dtype, or in pages kFloat8E4M3 or kInt8
  KvScale k_scale, v_scale;           // with those two
  bool scales_of_tokens = false;      // both are (num_blocks, block_size, Hk)
  int32_t max_q_len = INT32_MAX;      // of longer sequences no result is given, another kernel has them

  // Workspaces, not initialized; 2 * num_teams areas of config.slots_of_area slots each. A team has at most two parts
  // of rows whose other keys are with other teams: one that it ends, and one that others go on with, an area for each.
  // Batch-invariant, the first is for a sequence that the team begins and others go on with, with a slot for each
  // split, whoever has it, and the second for those that it has alone.
  float* partial_out = nullptr;   // (slots, rows_of_slot, Dv) relative to the reference below
  float2* partial_sum = nullptr;  // (slots, rows_of_slot): the rows' reference of exponentials (base 2), and sum
  uint64_t* marks = nullptr;      // (num_teams): launch_id once what others wait for is there; 0 again at the end

  PagedDecodeConfig config = {};  // from paged_decode_config, with fits

  // Derived by paged_decode.
  uint64_t launch_id = 0;
  bool even_rows =
      false;  // of 8 bits: kPagedDecodeEvenRows rows lie in one page, or there are none, at distances of 32 bits
  FastDivide num_parts_div, num_columns_div, num_kv_heads_div;
};

// Enqueues the kernel. Needs T > 0. cudaErrorInvalidValue if no instantiation fits.
cudaError_t paged_decode(const PagedDecodeParams& params, cudaStream_t stream);

}  // namespace fastattn
