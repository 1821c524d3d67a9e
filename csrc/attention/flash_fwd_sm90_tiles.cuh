// The unit of work of the Hopper attention kernel: which rows, which keys, and how it reaches the warps.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "arch/fast_divide.h"
#include "arch/mbarrier.cuh"
#include "attention/flash_fwd_sm90.h"
#include "attention/mask.cuh"

namespace fastattn {

struct FlashFwdSm90Args {
  CUtensorMap q, k, v;
  FlashFwdSm90Params p;
  FastDivide num_splits;
  FastDivide group_size;  // H / Hk
  FastDivide num_heads;   // H
  SectionLookup order;
  int32_t num_m_tiles;
  int32_t num_tiles;
};

// ---------------------------------------------------------------------------------------------
// One CTA's unit of work: BLOCK_M query rows of one head, and the key blocks that some of them see.
struct FlashTile {
  int32_t head_idx, seq_idx, split_idx, first_row;
  int32_t q_start, q_len, k_start, k_len;
  int32_t begin_step, end_step;  // begin == end: no key is seen. end < 0: there are no more tiles
};

// How many query rows a sequence has; with seqused_q not all of them count.
__device__ __forceinline__ int32_t num_rows_of_sequence(const FlashFwdSm90Params& p, int32_t seq_idx) {
  if (p.cu_seqlens_q == nullptr) return static_cast<int32_t>(p.q_tokens);
  return p.cu_seqlens_q[seq_idx + 1] - p.cu_seqlens_q[seq_idx];
}

// The tile of that number (order: flash_fwd_sm90_config.h); false if the sequence has no such rows.
template <int BLOCK_M, int BLOCK_N>
__device__ __forceinline__ bool decode_tile(const FlashFwdSm90Args& args, int32_t idx, FlashTile& tile) {
  const FlashFwdSm90Params& p = args.p;
  const int32_t tile_of_all = args.num_splits.divide(idx);
  tile.split_idx = idx - tile_of_all * args.num_splits.divisor;
  const auto [pair, level] = args.order.find(tile_of_all);
  tile.first_row = (args.num_m_tiles - 1 - level) * BLOCK_M;
  tile.seq_idx = args.num_heads.divide(pair);
  tile.head_idx = pair - tile.seq_idx * args.num_heads.divisor;

  tile.q_start = p.cu_seqlens_q != nullptr ? p.cu_seqlens_q[tile.seq_idx] : 0;
  tile.q_len = num_rows_of_sequence(p, tile.seq_idx);
  if (tile.first_row >= tile.q_len) return false;
  if (p.seqused_q != nullptr) tile.q_len = min(tile.q_len, p.seqused_q[tile.seq_idx]);
  tile.k_start = 0;
  tile.k_len = static_cast<int32_t>(p.k_tokens);
  if (p.cu_seqlens_k != nullptr) {
    tile.k_start = p.cu_seqlens_k[tile.seq_idx];
    tile.k_len = p.cu_seqlens_k[tile.seq_idx + 1] - tile.k_start;
  }
  if (p.seqused_k != nullptr) tile.k_len = min(tile.k_len, p.seqused_k[tile.seq_idx]);

  tile.begin_step = tile.end_step = 0;
  if (tile.first_row >= tile.q_len) return true;
  const AttentionMask mask = {tile.q_len, tile.k_len, p.window_left, p.window_right};
  const int32_t begin = mask.visible(tile.first_row).begin;
  const int32_t end = mask.visible(min(tile.first_row + BLOCK_M, tile.q_len) - 1).end;
  if (begin < end) {
    tile.begin_step = begin / BLOCK_N;
    tile.end_step = (end + BLOCK_N - 1) / BLOCK_N;
    const int32_t num_steps = args.num_splits.divide(tile.end_step - tile.begin_step + args.num_splits.divisor - 1);
    tile.begin_step = min(tile.begin_step + tile.split_idx * num_steps, tile.end_step);
    tile.end_step = min(tile.begin_step + num_steps, tile.end_step);
  }
  return true;
}

// Reads the tiles in the order in which the producer hands them out.
template <typename Storage>
struct FlashTileReader {
  Storage& smem;
  RingPosition<Storage::kTileStages> ring;

  __device__ __forceinline__ explicit FlashTileReader(Storage& s) : smem(s) {}

  // By a whole warp. False if there are no more.
  __device__ __forceinline__ bool next(FlashTile& tile) {
    smem.tile_full[ring.stage()].wait(ring.parity());
    tile = smem.tile[ring.stage()];
    __syncwarp();
    if (threadIdx.x % 32 == 0) smem.tile_empty[ring.stage()].arrive();
    ring.advance();
    return tile.end_step >= 0;
  }
};

}  // namespace fastattn
