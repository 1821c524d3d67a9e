// Attention backward for sm_80 and later: dq, dk, dv of out = softmax(mask(q k^T * scale)) v, for a batch of sequences
// of one length or for packed ones. What is computed and how is said in flash_bwd_sm80.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "arch/fast_divide.h"
#include "attention/flash_bwd_sm80_config.h"

namespace fastattn {

// Strides count elements. Rows (the last dimension) are contiguous and 16-byte aligned. Where sequences are packed,
// batch strides are 0.
struct FlashBwdSm80Params {
  struct Input {
    const void* data = nullptr;
    int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
  };
  struct Output {
    void* data = nullptr;
    int64_t batch_stride = 0, token_stride = 0, head_stride = 0;
  };
  Input q, k;       // (B, Sq, H, D), (B, Sk, Hk, D), or packed (T, H, D), (Tk, Hk, D)
  Input v;          // (B, Sk, Hk, Dv), (Tk, Hk, Dv)
  Input out, dout;  // (B, Sq, H, Dv), (T, H, Dv)
  Output dq, dk, dv;

  const float* lse = nullptr;   // (B, H, Sq) or (H, T), natural log; rows of -inf or inf have gradient 0
  const float* dlse = nullptr;  // the same shape, or nullptr: 0
  int64_t lse_batch_stride = 0, lse_head_stride = 0;
  int64_t dlse_batch_stride = 0, dlse_head_stride = 0;

  // Workspaces, config.padded_tokens rows for each head.
  float* lse_base2 = nullptr;  // (H, rows)
  float* delta = nullptr;      // (H, rows)
  float* dq_accum = nullptr;   // (H, rows, compiled head dim), in an order of its own; nullptr: deterministic

  // If config.num_splits > 1: (splits, k tokens in all, Hk, compiled head dim) each.
  float* dk_partial = nullptr;
  float* dv_partial = nullptr;

  const int32_t* cu_seqlens_q = nullptr;  // (B + 1), or nullptr: a batch
  const int32_t* cu_seqlens_k = nullptr;
  const int32_t* seqused_q = nullptr;  // (B), or nullptr: all of each sequence counts
  const int32_t* seqused_k = nullptr;
  const float* alibi_slopes = nullptr;  // (H) or (B, H)
  int64_t alibi_batch_stride = 0;       // 0: (H)

  int64_t q_tokens = 0, k_tokens = 0;  // Sq and Sk, or T and Tk
  int32_t num_seqs = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t v_head_dim = 0;

  float softmax_scale = 1.0f;
  float softcap = 0.0f;       // 0: none
  int32_t window_left = -1;   // -1: open; at most 2^30
  int32_t window_right = -1;  // the same; causal is 0

  DType dtype = DType::kBFloat16;
  FlashBwdSm80Config config = {};
};

// Enqueues the kernels. cudaErrorInvalidValue if no instantiation fits: they are of bfloat16 and float16, with head
// dims up to 256.
cudaError_t flash_bwd_sm80(const FlashBwdSm80Params& params, cudaStream_t stream);

}  // namespace fastattn
