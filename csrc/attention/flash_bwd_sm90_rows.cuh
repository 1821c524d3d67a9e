// Query rows as the kernels of the gradient count them: per head in blocks of block_m, a sequence beginning with a new
// one, so that a block never has rows of two sequences.
#pragma once

#include <cstdint>

#include "attention/flash_bwd_sm90.h"

namespace fastattn {

struct SequenceRows {
  int32_t start;        // of the sequence in the tensor
  int32_t len;          // rows that count
  int32_t allocated;    // rows there are
  int64_t first_block;  // of the sequence in the workspaces
};

__device__ __forceinline__ SequenceRows query_rows(const FlashBwdSm90Params& p, int32_t seq_idx, int block_m) {
  SequenceRows rows = {0, static_cast<int32_t>(p.q_tokens), static_cast<int32_t>(p.q_tokens),
                       seq_idx * p.config.blocks_of_seq};
  if (p.cu_seqlens_q != nullptr) {
    rows.start = p.cu_seqlens_q[seq_idx];
    rows.allocated = rows.len = p.cu_seqlens_q[seq_idx + 1] - rows.start;
    rows.first_block = rows.start / block_m + seq_idx;
  }
  if (p.seqused_q != nullptr) rows.len = min(rows.len, p.seqused_q[seq_idx]);
  return rows;
}

}  // namespace fastattn
