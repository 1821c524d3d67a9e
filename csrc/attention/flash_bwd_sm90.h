// Gradients of attention for Hopper (wgmma, TMA), over batches of one length or packed sequences. The kernels are in
// flash_bwd_sm90.cuh and flash_bwd_sm90.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "attention/flash_bwd_sm90_config.h"

namespace fastattn {

// Strides count elements and are multiples of 8 (16 bytes); rows (the last dimension) are contiguous and 16-byte
// aligned. Packed sequences are a batch of one tensor: num_seqs counts the sequences all the same.
struct FlashBwdSm90Params {
  const void* dout = nullptr;   // (B, Sq, H, Dv), packed (T, H, Dv)
  const void* q = nullptr;      // (B, Sq, H, D), packed (T, H, D)
  const void* k = nullptr;      // (B, Sk, Hk, D), packed (Tk, Hk, D)
  const void* v = nullptr;      // (B, Sk, Hk, Dv), packed (Tk, Hk, Dv)
  const void* out = nullptr;    // like dout
  const float* lse = nullptr;   // (B, H, Sq), packed (H, T); natural log, infinite where a row sees no key
  const float* dlse = nullptr;  // like lse, contiguous; or nullptr: zero
  void* dq = nullptr;           // like q, contiguous
  void* dk = nullptr;           // like k, contiguous
  void* dv = nullptr;           // like v, contiguous

  // Workspaces: config.rows(H) floats each; as many times config.head_dim; one counter, and if deterministic two for
  // each block of rows.
  float* lse_log2 = nullptr;
  float* delta = nullptr;
  float* dq_sum = nullptr;
  int32_t* tile_counter = nullptr;
  int32_t* turns = nullptr;  // nullptr: contributions to dQ are added in any order

  const int32_t* cu_seqlens_q = nullptr;  // (B + 1) if packed, else nullptr
  const int32_t* cu_seqlens_k = nullptr;
  const int32_t* seqused_q = nullptr;   // (B) or nullptr: how many rows of each sequence count
  const int32_t* seqused_k = nullptr;   // (B) or nullptr: how many keys
  const float* alibi_slopes = nullptr;  // (H) or (B, H)

  int64_t dout_batch_stride = 0, dout_token_stride = 0, dout_head_stride = 0;
  int64_t q_batch_stride = 0, q_token_stride = 0, q_head_stride = 0;
  int64_t k_batch_stride = 0, k_token_stride = 0, k_head_stride = 0;
  int64_t v_batch_stride = 0, v_token_stride = 0, v_head_stride = 0;
  int64_t out_batch_stride = 0, out_token_stride = 0, out_head_stride = 0;
  int64_t alibi_batch_stride = 0;  // 0: (H)

  int64_t q_tokens = 0, k_tokens = 0;  // Sq and Sk, packed T and Tk
  int32_t num_seqs = 0;                // B
  int32_t num_heads = 0;               // H
  int32_t num_kv_heads = 0;            // Hk
  int32_t head_dim = 0;                // D
  int32_t v_head_dim = 0;              // Dv

  float softmax_scale = 1.0f;  // positive
  float softcap = 0.0f;        // 0: none
  int32_t window_left = -1;    // -1: open; at most 2^30
  int32_t window_right = -1;   // the same; causal is 0

  DType dtype = DType::kBFloat16;
  FlashBwdSm90Config config = {};  // from flash_bwd_sm90_config
};

// Enqueues three kernels: what each row needs beforehand, the gradients, and dQ rounded. Needs at least one query row
// and one key. cudaErrorInvalidValue if no instantiation fits.
cudaError_t flash_bwd_sm90(const FlashBwdSm90Params& params, cudaStream_t stream);

}  // namespace fastattn
