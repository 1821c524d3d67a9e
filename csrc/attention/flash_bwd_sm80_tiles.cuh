// What the kernels of flash_bwd_sm80 share: a sequence's place in the tensors, and P from S.
#pragma once

#include <cstdint>

#include "arch/tile_copy.cuh"
#include "attention/flash_bwd_sm80.h"
#include "attention/mask.cuh"
#include "attention/softmax.cuh"

namespace fastattn {

// One sequence: where it begins and how much of it counts.
struct BwdSequence {
  int32_t seq_idx;
  int32_t q_start = 0, k_start = 0;  // 0 in a batch, whose sequences are apart by the batch strides
  int32_t q_len, k_len;
  int64_t padded_start;  // its first row in the workspaces

  __device__ __forceinline__ BwdSequence(const FlashBwdSm80Params& p, int32_t seq_idx, int32_t block_m)
      : seq_idx(seq_idx) {
    if (p.cu_seqlens_q != nullptr) {
      q_start = p.cu_seqlens_q[seq_idx];
      k_start = p.cu_seqlens_k[seq_idx];
      q_len = p.cu_seqlens_q[seq_idx + 1] - q_start;
      k_len = p.cu_seqlens_k[seq_idx + 1] - k_start;
      // Rounded down, one block more for each sequence before: they do not overlap.
      padded_start = (q_start + static_cast<int64_t>(seq_idx) * block_m) / block_m * block_m;
    } else {
      q_len = static_cast<int32_t>(p.q_tokens);
      k_len = static_cast<int32_t>(p.k_tokens);
      padded_start = seq_idx * p.config.num_m_blocks * block_m;
    }
    if (p.seqused_q != nullptr) q_len = max(min(p.seqused_q[seq_idx], q_len), 0);
    if (p.seqused_k != nullptr) k_len = max(min(p.seqused_k[seq_idx], k_len), 0);
  }

  // Rows of one head, the first being query (or key) `first`.
  template <typename T>
  __device__ __forceinline__ const T* rows(const FlashBwdSm80Params::Input& t, int32_t start, int32_t first,
                                           int32_t head) const {
    return static_cast<const T*>(t.data) + seq_idx * t.batch_stride +
           (static_cast<int64_t>(start) + first) * t.token_stride + head * t.head_stride;
  }
  template <typename T>
  __device__ __forceinline__ T* rows(const FlashBwdSm80Params::Output& t, int32_t start, int32_t first,
                                     int32_t head) const {
    return static_cast<T*>(t.data) + seq_idx * t.batch_stride + (static_cast<int64_t>(start) + first) * t.token_stride +
           head * t.head_stride;
  }
};

// Which block of keys a CTA has, of which KV head and sequence, and for which part of the group's heads.
struct BwdKeyBlock {
  int32_t n_block, kv_head_idx, split_idx, seq_idx;

  __device__ __forceinline__ BwdKeyBlock(const FlashBwdSm80Params& p, uint32_t index, uint32_t num_splits) {
    const uint32_t num_pairs = static_cast<uint32_t>(p.num_kv_heads) * num_splits * p.num_seqs;
    const uint32_t num_n_blocks = static_cast<uint32_t>(p.config.num_n_blocks);
    const uint32_t section = index / (num_n_blocks * p.config.pairs_per_section);
    const uint32_t first_pair = section * p.config.pairs_per_section;
    const uint32_t pairs = min(static_cast<uint32_t>(p.config.pairs_per_section), num_pairs - first_pair);
    const uint32_t in_section = index - first_pair * num_n_blocks;
    n_block = in_section / pairs;
    uint32_t pair = first_pair + in_section % pairs;
    split_idx = pair % num_splits;
    pair /= num_splits;
    kv_head_idx = pair % p.num_kv_heads;
    seq_idx = pair / p.num_kv_heads;
  }

  // The row of key `first_key` in dk_partial and dv_partial; the next key's is num_kv_heads behind.
  __device__ __forceinline__ int64_t partial_row(const FlashBwdSm80Params& p, const BwdSequence& sequence,
                                                 int32_t first_key, int32_t split) const {
    const bool packed = p.cu_seqlens_k != nullptr;
    const int64_t num_tokens = packed ? p.k_tokens : p.num_seqs * p.k_tokens;
    const int64_t token = (packed ? sequence.k_start : seq_idx * p.k_tokens) + first_key;
    return (split * num_tokens + token) * p.num_kv_heads + kv_head_idx;
  }
};

// How scores become probabilities; everything in base 2.
struct BwdScores {
  AttentionMask mask;
  ScoreScale scale;
  float slope;  // of ALiBi, 0 for none

  // Turns scores of one warp, whose lane has rows first_row + 0, 8, 16 .. and keys first_key + 0, 1, 8, 9 .., into
  // P = exp(s - lse), gives it to store(m, tile, half, p0, p1), and leaves P times the derivative of softcap.
  template <bool MASKED, bool GENERAL, int TILES_M, int TILES_N, typename Store>
  __device__ __forceinline__ void probabilities(float (&scores)[TILES_M][TILES_N][4], const float (&lse)[TILES_M][2],
                                                int32_t first_row, int32_t first_key, Store store) const {
#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = first_row + m * 16 + half * 8;
        const KeyRange visible = MASKED ? mask.visible(row) : KeyRange{};
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
          float derivative[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& score = scores[m][n][2 * half + i];
            const int32_t key = first_key + n * 8 + i;
            derivative[i] = 1.0f;
            if constexpr (GENERAL) {
              score *= scale.pre;
              if (scale.softcap > 0.0f) {
                const float tanh = tanh_exp2(score);
                score = scale.softcap * tanh;
                derivative[i] = 1.0f - tanh * tanh;
              }
              score -= slope * abs(row + mask.k_len - mask.q_len - key);
              score = exp2_approx(score - lse[m][half]);
            } else {
              score = exp2_approx(score * scale.pre - lse[m][half]);
            }
            if (MASKED && (key < visible.begin || key >= visible.end)) score = 0.0f;
          }
          store(m, n, half, scores[m][n][2 * half], scores[m][n][2 * half + 1]);
          if constexpr (GENERAL) {
            scores[m][n][2 * half] *= derivative[0];
            scores[m][n][2 * half + 1] *= derivative[1];
          }
        }
      }
    }
  }

  // The same, by what a block of queries (first_row to last_row, of the tile) and keys needs.
  template <int BLOCK_N, int TILES_M, int TILES_N, typename Store>
  __device__ __forceinline__ void probabilities(float (&scores)[TILES_M][TILES_N][4], const float (&lse)[TILES_M][2],
                                                int32_t lane_row, int32_t lane_key, int32_t first_row, int32_t last_row,
                                                int32_t first_key, Store store) const {
    const bool masked = mask.visible(last_row).begin > first_key || mask.visible(first_row).end < first_key + BLOCK_N;
    if (scale.softcap > 0.0f || slope != 0.0f) {
      probabilities<true, true>(scores, lse, lane_row, lane_key, store);
    } else if (masked) {
      probabilities<true, false>(scores, lse, lane_row, lane_key, store);
    } else {
      probabilities<false, false>(scores, lse, lane_row, lane_key, store);
    }
  }
};

__device__ __forceinline__ float alibi_slope(const FlashBwdSm80Params& p, int32_t seq_idx, int32_t head_idx) {
  return p.alibi_slopes == nullptr ? 0.0f : kLog2E * p.alibi_slopes[seq_idx * p.alibi_batch_stride + head_idx];
}

}  // namespace fastattn
