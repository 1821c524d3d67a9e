// The unit of work of the Hopper attention gradient: which keys, and which rows see them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "arch/fast_divide.h"
#include "attention/flash_bwd_sm90.h"
#include "attention/flash_bwd_sm90_rows.cuh"

namespace fastattn {

struct FlashBwdSm90Args {
  CUtensorMap q, k, v, dout;
  CUtensorMap lse_log2, delta;  // of the workspaces: (H, blocks of a head, BLOCK_M)
  FlashBwdSm90Params p;
  FastDivide group_size;    // H / Hk
  FastDivide num_kv_heads;  // Hk
  SectionLookup order;
  int32_t num_tiles;
};

// ---------------------------------------------------------------------------------------------
// One CTA's unit of work: BLOCK_N keys of one KV head, and the row blocks that see some of them.
struct FlashBwdTile {
  int32_t kv_head_idx, seq_idx, first_key;
  int32_t q_start, q_len, k_start, k_len, k_allocated;
  int32_t begin_block, end_block;  // of each head; begin == end: no row sees these keys
  int32_t first_block;             // of the sequence in the workspaces
  int32_t direction;               // from block to block, 1 or -1, if heads come last
  int32_t more;                    // 0: there are no more tiles
};

// The tile of that number (order: flash_bwd_sm90_config.h); false if the sequence has no such keys.
template <int BLOCK_M, int BLOCK_N>
__device__ __forceinline__ bool decode_tile(const FlashBwdSm90Args& args, int32_t idx, FlashBwdTile& tile) {
  const FlashBwdSm90Params& p = args.p;
  const auto [pair, level] = args.order.find(idx);
  tile.first_key = level * BLOCK_N;
  tile.seq_idx = args.num_kv_heads.divide(pair);
  tile.kv_head_idx = pair - tile.seq_idx * args.num_kv_heads.divisor;

  tile.k_start = 0;
  tile.k_allocated = static_cast<int32_t>(p.k_tokens);
  if (p.cu_seqlens_k != nullptr) {
    tile.k_start = p.cu_seqlens_k[tile.seq_idx];
    tile.k_allocated = p.cu_seqlens_k[tile.seq_idx + 1] - tile.k_start;
  }
  if (tile.first_key >= tile.k_allocated) return false;
  tile.k_len = tile.k_allocated;
  if (p.seqused_k != nullptr) tile.k_len = min(tile.k_len, p.seqused_k[tile.seq_idx]);
  const SequenceRows rows = query_rows(p, tile.seq_idx, BLOCK_M);
  tile.q_start = rows.start;
  tile.q_len = rows.len;
  tile.first_block = static_cast<int32_t>(rows.first_block);

  // Row i sees keys i + shift - left … i + shift + right.
  const int32_t shift = tile.k_len - tile.q_len;
  const int32_t last_key = min(tile.first_key + BLOCK_N, tile.k_len) - 1;
  int32_t begin = 0, end = tile.q_len;
  if (p.window_right >= 0) begin = max(begin, tile.first_key - shift - p.window_right);
  if (p.window_left >= 0) end = min(end, last_key - shift + p.window_left + 1);
  tile.begin_block = tile.end_block = 0;
  if (begin < end && tile.first_key <= last_key) {
    tile.begin_block = begin / BLOCK_M;
    tile.end_block = (end + BLOCK_M - 1) / BLOCK_M;
  }
  tile.direction = p.turns == nullptr && idx / static_cast<int32_t>(gridDim.x) % 2 != 0 ? 1 : -1;
  tile.more = 1;
  return true;
}

}  // namespace fastattn
