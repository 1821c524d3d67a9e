// Attention forward for Hopper (wgmma, TMA): out = softmax(mask(q k^T * scale)) v over batches of one length or
// packed sequences. The kernel is in flash_fwd_sm90.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "arch/dtype.h"
#include "arch/kv_scale.h"
#include "attention/flash_fwd_sm90_config.h"

namespace fastattn {

// Factors of fp8 inputs, (B, Hk), or of a cache of 8 bits, (Hk); without data all are 1.
struct FlashDescale {
  const float* data = nullptr;
  int64_t seq_stride = 0, head_stride = 0;
};

// Strides count elements and are multiples of 16 bytes; rows (the last dimension) are contiguous and 16-byte
// aligned. Packed sequences are a batch of one tensor: num_seqs counts the sequences all the same.
struct FlashFwdSm90Params {
  const void* q = nullptr;  // (B, Sq, H, D), packed (T, H, D)
  const void* k = nullptr;  // (B, Sk, Hk, D), packed (Tk, Hk, D), paged (num_pages, page size, Hk, D)
  const void* v = nullptr;  // like k
  void* out = nullptr;      // like q, of its dtype; or with out_scale e4m3
  float* lse = nullptr;     // (B, H, Sq), packed (H, T); natural log, -inf where a row sees no key

  // Workspaces if config.num_splits > 1: (splits, T, H, D) and splits times what lse holds; out is contiguous then.
  float* partial_out = nullptr;
  float* partial_lse = nullptr;
  // How many tiles were handed out: zeroed by flash_fwd_sm90, but where it is `beside`.
  int32_t* tile_counter = nullptr;

  const int32_t* cu_seqlens_q = nullptr;  // (B + 1) if packed, else nullptr
  const int32_t* cu_seqlens_k = nullptr;
  const int32_t* seqused_q = nullptr;    // (B) or nullptr: how many rows of each sequence count
  const int32_t* seqused_k = nullptr;    // (B) or nullptr: and keys; a paged cache needs it
  const int32_t* block_table = nullptr;  // (B, max_blocks), paged only; read up to the length only
  int64_t block_table_stride = 0;

  const float* alibi_slopes = nullptr;  // (H) or (B, H): score -= slope * |i + Sk - Sq - j|, after the softcap
  int64_t alibi_batch_stride = 0;       // 0: (H)
  const float* sinks = nullptr;         // (H): a further logit of each row, without a value
  const float* out_scale = nullptr;     // (1), paged and without seqused_q only: what out in e4m3 is divided by

  FlashDescale q_descale, k_descale, v_descale;  // out is bf16 of fp8 inputs
  KvScale k_scale, v_scale;                      // of each token of a cache of 8 bits, or no data

  int64_t q_batch_stride = 0, q_token_stride = 0, q_head_stride = 0;
  int64_t k_batch_stride = 0, k_token_stride = 0, k_head_stride = 0;
  int64_t v_batch_stride = 0, v_token_stride = 0, v_head_stride = 0;
  int64_t out_batch_stride = 0, out_token_stride = 0, out_head_stride = 0;
  int64_t lse_batch_stride = 0, lse_head_stride = 0;

  int64_t q_tokens = 0, k_tokens = 0;  // Sq and Sk, packed T and Tk; paged: of a page, a multiple of 8
  int64_t num_pages = 0;               // paged only
  int32_t max_blocks = 0;              // paged only: of a sequence
  int64_t num_tokens = 0;              // T, of a batch B * Sq
  int32_t num_seqs = 0;                // B
  int32_t min_q_len = 0;               // packed only: of shorter sequences no result is given, another kernel has them
  int32_t num_heads = 0;               // H
  int32_t num_kv_heads = 0;            // Hk
  int32_t head_dim = 0;                // D
  int32_t v_head_dim = 0;              // of v and out

  float softmax_scale = 1.0f;  // positive
  float softcap = 0.0f;        // 0: none
  int32_t window_left = -1;    // -1: open; at most 2^30
  int32_t window_right = -1;   // the same; causal is 0

  DType dtype = DType::kBFloat16;
  DType kv_dtype = DType::kBFloat16;  // dtype; or paged, of bf16 or fp16: kFloat8E4M3 or kInt8, head_dim v_head_dim
  FlashFwdSm90Config config = {};     // from flash_fwd_sm90_config

  // Packed only, without splits: runs while the kernel in front of it in the stream still does, and takes the SMs that
  // this one does not have, or leaves. It ends after that one. What it reads was there before that one began, and
  // tile_counter is zero by then.
  bool beside = false;
};

// Whether a call needs what the plain kernel is compiled without.
inline bool flash_fwd_sm90_extras(const FlashFwdSm90Params& p) {
  return p.softcap > 0.0f || p.alibi_slopes != nullptr || p.sinks != nullptr || p.seqused_q != nullptr ||
         p.out_scale != nullptr;
}

// Whether K and V are of 8 bits and q is not.
inline bool flash_fwd_sm90_widens(const FlashFwdSm90Params& p) {
  return p.dtype != DType::kFloat8E4M3 && (p.kv_dtype == DType::kFloat8E4M3 || p.kv_dtype == DType::kInt8);
}

// Enqueues the kernel. Needs at least one query row. cudaErrorInvalidValue if no instantiation fits.
cudaError_t flash_fwd_sm90(const FlashFwdSm90Params& params, cudaStream_t stream);

}  // namespace fastattn
