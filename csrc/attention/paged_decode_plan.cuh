// Which keys of which sequences a CTA of the decode kernel takes (paged_decode.cuh has the picture). Every warp finds
// it from the lengths for itself.
#pragma once

#include "attention/mask.cuh"
#include "attention/paged_decode.h"

namespace fastattn {

// Lengths of one sequence, and which keys a column's rows see: first_row and the 15 behind it.
template <typename Mask>
struct DecodeSequence {
  int32_t q_start;
  int32_t num_rows, all_rows;       // of the column: with results, and with those that get zeros
  int32_t first_token, last_token;  // of them
  Mask mask;
  KeyRange visible;  // to any row

  DecodeSequence() = default;
  __device__ __forceinline__ DecodeSequence(const PagedDecodeParams& p, int32_t seq_idx, int32_t first_row) {
    const bool packed_q = p.cu_seqlens_q != nullptr;
    q_start = packed_q ? p.cu_seqlens_q[seq_idx] : 0;
    int32_t all_q_len = packed_q ? p.cu_seqlens_q[seq_idx + 1] - q_start : p.batch_q_len;
    if (all_q_len > p.max_q_len) all_q_len = 0;
    const int32_t q_len = p.seqused_q == nullptr ? all_q_len : max(min(p.seqused_q[seq_idx], all_q_len), 0);
    num_rows = max(min(q_len * p.group_size.divisor - first_row, kPagedDecodeRows), 0);
    all_rows = max(min(all_q_len * p.group_size.divisor - first_row, kPagedDecodeRows), 0);
    first_token = p.group_size.divide(first_row);
    last_token = p.group_size.divide(first_row + max(num_rows - 1, 0));
    mask = Mask::make(p, q_len, key_length(p, seq_idx), q_start);
    visible = {0, 0};
    if (num_rows > 0) visible = mask.seen_by_any(first_token, last_token);
  }

  static __device__ __forceinline__ int32_t key_length(const PagedDecodeParams& p, int32_t seq_idx) {
    int64_t most = static_cast<int64_t>(p.max_blocks) * p.block_size;
    if (!p.paged) {
      most = p.cu_seqlens_k == nullptr ? p.batch_k_len : p.cu_seqlens_k[seq_idx + 1] - p.cu_seqlens_k[seq_idx];
    }
    if (p.seqused_k == nullptr) return static_cast<int32_t>(most);
    return static_cast<int32_t>(min(static_cast<int64_t>(max(p.seqused_k[seq_idx], 0)), most));
  }

  // Tiles are aligned: the first one may begin before the visible keys.
  __device__ __forceinline__ int32_t first_tile(const PagedDecodeParams& p) const {
    return visible.begin >> p.config.block_n_log2;
  }
  __device__ __forceinline__ int32_t num_tiles(const PagedDecodeParams& p) const {
    return visible.begin < visible.end ? ((visible.end - 1) >> p.config.block_n_log2) - first_tile(p) + 1 : 1;
  }
};

// The tiles of a CTA, and where they begin; found by whole warps.
template <typename Mask>
struct DecodePlan {
  int32_t column_idx, part_idx;
  int32_t kv_head_idx, first_row;
  int32_t tiles_per_part;
  int32_t begin_tile, end_tile;
  int32_t seq_idx;    // that has begin_tile
  int32_t seq_begin;  // its first tile

  __device__ __forceinline__ explicit DecodePlan(const PagedDecodeParams& p) {
    const int lane = threadIdx.x % 32;
    part_idx = p.num_columns_div.divide(blockIdx.x);
    column_idx = blockIdx.x - part_idx * p.num_columns_div.divisor;
    const int32_t row_tile = p.num_kv_heads_div.divide(column_idx);
    kv_head_idx = column_idx - row_tile * p.num_kv_heads;
    first_row = row_tile * kPagedDecodeRows;
    // Of up to 32 sequences, every lane keeps one's number of tiles; of more, they are looked up again.
    const auto num_tiles = [&](int32_t seq) {
      return seq < p.num_seqs ? DecodeSequence<Mask>(p, seq, first_row).num_tiles(p) : 0;
    };
    int32_t own = 0, all_tiles = 0;
#pragma unroll 1
    for (int32_t seq = lane; seq - lane < p.num_seqs; seq += 32) all_tiles += own = num_tiles(seq);
    all_tiles = __reduce_add_sync(0xffffffffu, all_tiles);
    tiles_per_part = p.num_parts_div.divide(all_tiles + p.num_parts_div.divisor - 1);
    begin_tile = part_idx * tiles_per_part;
    end_tile = min(begin_tile + tiles_per_part, all_tiles);
    if (begin_tile >= end_tile) return;

    seq_begin = 0;
#pragma unroll 1
    for (seq_idx = 0;; seq_idx += 32) {
      if (p.num_seqs > 32) own = num_tiles(seq_idx + lane);
      int32_t end = own;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int32_t below = __shfl_up_sync(0xffffffffu, end, distance);
        if (lane >= distance) end += below;
      }
      const uint32_t ends_behind = __ballot_sync(0xffffffffu, begin_tile < seq_begin + end);
      if (ends_behind != 0) {
        const int found = __ffs(ends_behind) - 1;
        seq_idx += found;
        seq_begin += __shfl_sync(0xffffffffu, end - own, found);
        return;
      }
      seq_begin += __shfl_sync(0xffffffffu, end, 31);
    }
  }

  // Of a row of the KV head.
  __device__ __forceinline__ int32_t head(const PagedDecodeParams& p, int32_t row) const {
    return kv_head_idx * p.group_size.divisor + p.group_size.remainder(row);
  }
};

// Goes from sequence to sequence along a CTA's tiles.
template <typename Mask>
struct DecodeCursor {
  int32_t next_seq_idx;
  int32_t seq_begin = 0, seq_end;  // tiles of the sequence, also those before and behind the CTA's
  int32_t first_key = 0;           // of its first tile that is the CTA's

  __device__ __forceinline__ explicit DecodeCursor(const DecodePlan<Mask>& plan)
      : next_seq_idx(plan.seq_idx), seq_end(plan.seq_begin) {}

  __device__ __forceinline__ DecodeSequence<Mask> next(const PagedDecodeParams& p, const DecodePlan<Mask>& plan) {
    const DecodeSequence<Mask> sequence(p, next_seq_idx++, plan.first_row);
    seq_begin = seq_end;
    seq_end += sequence.num_tiles(p);
    first_key = (sequence.first_tile(p) + max(plan.begin_tile - seq_begin, 0)) * p.config.block_n;
    return sequence;
  }
};

}  // namespace fastattn
