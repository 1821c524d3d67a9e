// What a call of the attention kernels on mma.sync is about: flash_sm80 and paged_decode.
#pragma once

#include <cstdint>

#include "arch/dtype.h"
#include "arch/fast_divide.h"

namespace fastattn {

// What a longer window is cut down to; no sequence is that long.
constexpr int32_t kMaxWindow = 1 << 30;

// Query tokens of a sequence that can be a tree: the bits of a word.
constexpr int32_t kMaxTreeTokens = 64;

// Strides count elements. Rows (the last dimension) are contiguous and 16-byte aligned.
struct AttentionParams {
  const void* q = nullptr;  // (T, H, D)
  const void* k = nullptr;  // (Tk, Hk, D), or pages (num_blocks, block_size, Hk, D)
  const void* v = nullptr;  // like k, with Dv; in pages Dv = D
  void* out = nullptr;      // (T, H, Dv) contiguous, of dtype; or with out_scale e4m3
  float* lse = nullptr;     // (H, T), or (B, H, batch_q_len), natural log; -inf (or the sink) where a row sees no key

  const int32_t* cu_seqlens_q = nullptr;  // (B + 1), ascending from 0 to T; or nullptr: all are batch_q_len long
  const int32_t* cu_seqlens_k = nullptr;  // (B + 1), contiguous K and V only; or nullptr: all are batch_k_len long
  const int32_t* seqused_q = nullptr;     // (B) or nullptr: how many rows of each sequence count
  const int32_t* seqused_k = nullptr;     // (B) or nullptr: and keys; pages need it, new keys included
  const int32_t* block_table = nullptr;   // (B, max_blocks), pages only; used up to the length only

  int64_t q_batch_stride = 0, k_batch_stride = 0, v_batch_stride = 0;  // 0 where sequences are packed
  int64_t q_token_stride = 0, q_head_stride = 0;
  int64_t k_block_stride = 0, k_token_stride = 0, k_head_stride = 0;
  int64_t v_block_stride = 0, v_token_stride = 0, v_head_stride = 0;
  int64_t block_table_stride = 0;

  const float* alibi_slopes = nullptr;  // (H) or (B, H): score -= slope * |i + Sk - Sq - j|, after the softcap
  int64_t alibi_batch_stride = 0;       // 0: (H)
  const float* sinks = nullptr;         // (H): a further logit of each row, without a value
  const float* out_scale = nullptr;     // (1), pages only: what out in e4m3 is divided by

  int64_t num_tokens = 0;  // T
  int32_t batch_q_len = 0, batch_k_len = 0;
  int32_t num_seqs = 0;   // B
  int32_t num_heads = 0;  // H
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int32_t v_head_dim = 0;                                  // of v and out
  int32_t num_blocks = 0, max_blocks = 0, block_size = 1;  // pages only

  float softmax_scale = 1.0f;
  float softcap = 0.0f;       // 0: none
  int32_t window_left = -1;   // -1: open; at most 2^30
  int32_t window_right = -1;  // the same; causal is 0

  DType dtype = DType::kBFloat16;
  bool paged = false;
  // (T) or nullptr, pages and a causal mask only: bit j of a token's word is whether it sees the j-th query token of
  // its sequence, if that has up to kMaxTreeTokens.
  const int64_t* tree_mask = nullptr;

  // Derived by set_divisions.
  FastDivide group_size;      // H / Hk
  FastDivide block_size_div;  // by block_size

  void set_divisions() {
    group_size = FastDivide(num_heads / num_kv_heads);
    block_size_div = FastDivide(block_size);
  }
};

}  // namespace fastattn
