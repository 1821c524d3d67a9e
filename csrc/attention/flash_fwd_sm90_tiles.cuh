// The unit of work of the Hopper attention kernel: which rows, which keys, and how it reaches the warps.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "arch/fast_divide.h"
#include "arch/mbarrier.cuh"
#include "arch/tma.cuh"
#include "attention/flash_fwd_sm90.h"
#include "attention/mask.cuh"

namespace fastattn {

struct FlashFwdSm90Args {
  CUtensorMap q, k, v;
  FlashFwdSm90Params p;
  FastDivide num_splits;
  FastDivide group_size;  // H / Hk
  FastDivide tile_heads;  // that have tiles of their own: H, or Hk where a tile packs a group's
  SectionLookup order;
  FastDivide page_size;
  int32_t box_rows;          // of keys and values that one copy brings: those of a block that lie in one page
  int32_t num_boxes;         // in a block
  int32_t num_m_tiles;       // of a sequence
  int32_t heads_of_section;  // packed only, where sections are of one sequence; divides the heads
  int32_t num_tiles;         // packed: at most
  int32_t tile_tokens;       // of a tile
  int32_t few_keys;          // packs heads: of sequences with no more, what is read should leave the L2 cache as it is
};

// ---------------------------------------------------------------------------------------------
// One CTA's unit of work: BLOCK_M query rows of one head, and the key blocks that some of them see. Or, where it packs
// the heads of a group: row r is of token first_row + r / G and head head_idx + r % G.
struct FlashTile {
  int32_t head_idx, seq_idx, split_idx, first_row;
  int32_t q_start, q_len, k_start, k_len;
  int32_t begin_step, end_step;  // begin == end: no key is seen. end < 0: there are no more tiles
  uint32_t whole_groups;         // a bit for each group of 64 rows: has rows, of which some see the last block
};

// How many query rows a sequence has; with seqused_q not all of them count.
__device__ __forceinline__ int32_t num_rows_of_sequence(const FlashFwdSm90Params& p, int32_t seq_idx) {
  if (p.cu_seqlens_q == nullptr) return static_cast<int32_t>(p.q_tokens);
  return p.cu_seqlens_q[seq_idx + 1] - p.cu_seqlens_q[seq_idx];
}

// Finds the sequence of a tile where they are packed, by a whole warp that asks for ascending numbers: it goes through
// the sequences once, a lane for each of 32, and no number is spent on rows that a sequence shorter than others does
// not have.
struct PackedTiles {
  int32_t next_seq = 0;                  // behind the 32 in hand
  int32_t begin = 0, end = 0;            // the numbers of this lane's sequence's tiles
  int32_t seq_idx, num_m_tiles, in_seq;  // what was found

  // False if there is no such tile.
  __device__ __forceinline__ bool find(const FlashFwdSm90Args& args, int32_t idx, int32_t tile_tokens) {
    constexpr uint32_t kAll = 0xffffffffu;
    const int32_t lane = threadIdx.x % 32;
    const int32_t* const cu_seqlens = args.p.cu_seqlens_q;
    uint32_t past = __ballot_sync(kAll, end <= idx);
    while (past == kAll) {
      if (next_seq >= args.p.num_seqs) return false;
      const int32_t seq = next_seq + lane;
      int32_t num_rows = seq < args.p.num_seqs ? max(cu_seqlens[seq + 1] - cu_seqlens[seq], 0) : 0;
      if (num_rows < args.p.min_q_len) num_rows = 0;
      const int32_t num_tiles = (num_rows + tile_tokens - 1) / tile_tokens * args.tile_heads.divisor;
      int32_t sum = num_tiles;
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const int32_t below = __shfl_up_sync(kAll, sum, distance);
        if (lane >= distance) sum += below;
      }
      end = __shfl_sync(kAll, end, 31) + sum;
      begin = end - num_tiles;
      next_seq += 32;
      past = __ballot_sync(kAll, end <= idx);
    }
    const int owner = __popc(past);
    seq_idx = next_seq - 32 + owner;
    in_seq = idx - __shfl_sync(kAll, begin, owner);
    num_m_tiles = args.tile_heads.divide(__shfl_sync(kAll, end - begin, owner));
    return true;
  }
};

// The tile of that number (order: flash_fwd_sm90_config.h), by a whole warp; false if there are no more.
template <int BLOCK_M, int BLOCK_N, bool PACKS>
__device__ __forceinline__ bool decode_tile(const FlashFwdSm90Args& args, int32_t idx, PackedTiles& packed,
                                            FlashTile& tile) {
  if (idx >= args.num_tiles) return false;
  const FlashFwdSm90Params& p = args.p;
  const int32_t tile_tokens = PACKS ? args.tile_tokens : BLOCK_M;
  const int32_t tile_of_all = args.num_splits.divide(idx);
  tile.split_idx = idx - tile_of_all * args.num_splits.divisor;
  if (p.cu_seqlens_q != nullptr) {
    if (!packed.find(args, tile_of_all, tile_tokens)) return false;
    const int32_t section_tiles = args.heads_of_section * packed.num_m_tiles;
    const int32_t section = packed.in_seq / section_tiles;
    const int32_t in_section = packed.in_seq - section * section_tiles;
    const int32_t level = in_section / args.heads_of_section;
    tile.first_row = (packed.num_m_tiles - 1 - level) * tile_tokens;
    tile.seq_idx = packed.seq_idx;
    tile.head_idx = section * args.heads_of_section + in_section - level * args.heads_of_section;
    tile.q_start = p.cu_seqlens_q[tile.seq_idx];
  } else {
    const auto [pair, level] = args.order.find(tile_of_all);
    tile.first_row = (args.num_m_tiles - 1 - level) * tile_tokens;
    tile.seq_idx = args.tile_heads.divide(pair);
    tile.head_idx = pair - tile.seq_idx * args.tile_heads.divisor;
    tile.q_start = 0;
  }
  if (PACKS) tile.head_idx *= args.group_size.divisor;

  tile.q_len = num_rows_of_sequence(p, tile.seq_idx);
  if (p.seqused_q != nullptr) tile.q_len = min(tile.q_len, p.seqused_q[tile.seq_idx]);
  tile.k_start = 0;
  tile.k_len = static_cast<int32_t>(p.k_tokens);
  if (p.cu_seqlens_k != nullptr) {
    tile.k_start = p.cu_seqlens_k[tile.seq_idx];
    tile.k_len = p.cu_seqlens_k[tile.seq_idx + 1] - tile.k_start;
  }
  if (p.block_table != nullptr) tile.k_len = p.max_blocks * args.page_size.divisor;
  if (p.seqused_k != nullptr) tile.k_len = min(tile.k_len, p.seqused_k[tile.seq_idx]);

  tile.begin_step = tile.end_step = 0;
  tile.whole_groups = 0;
  if (tile.first_row >= tile.q_len) return true;
  const AttentionMask mask = {tile.q_len, tile.k_len, p.window_left, p.window_right};
  const int32_t begin = mask.visible(tile.first_row).begin;
  const int32_t end = mask.visible(min(tile.first_row + tile_tokens, tile.q_len) - 1).end;
  if (begin < end) {
    tile.begin_step = begin / BLOCK_N;
    tile.end_step = (end + BLOCK_N - 1) / BLOCK_N;
    const int32_t num_steps = args.num_splits.divide(tile.end_step - tile.begin_step + args.num_splits.divisor - 1);
    tile.begin_step = min(tile.begin_step + tile.split_idx * num_steps, tile.end_step);
    tile.end_step = min(tile.begin_step + num_steps, tile.end_step);
  }
#pragma unroll
  for (int group = 0; group < BLOCK_M / 64; ++group) {
    const auto token_of = [&](int row) {
      return tile.first_row + (PACKS ? args.group_size.divide(group * 64 + row) : group * 64 + row);
    };
    const bool sees_last = mask.visible(min(token_of(63), tile.q_len - 1)).end > (tile.end_step - 1) * BLOCK_N;
    const bool is_one = tile.end_step - tile.begin_step == 1;  // which all groups see
    if (tile.begin_step < tile.end_step && token_of(0) < tile.q_len && (sees_last || is_one))
      tile.whole_groups |= 1u << group;
  }
  return true;
}

// A block of keys or values to shared memory, by a whole warp: a lane for each box, which is a panel's rows of one
// page, or a whole panel where there are no pages. Behind the end of a paged sequence the table may hold anything: what
// would be there is zeros.
template <int PANELS, int WIDTH, int BLOCK_N, bool PACKS, typename T>
__device__ __forceinline__ void load_block(const FlashFwdSm90Args& args, const CUtensorMap& map, T* target,
                                           MBarrier& empty, MBarrier& full, uint32_t parity, const FlashTile& tile,
                                           int32_t step) {
  const FlashFwdSm90Params& p = args.p;
  const int lane = threadIdx.x % 32;
  const int32_t kv_head = args.group_size.divide(tile.head_idx), first_key = step * BLOCK_N;
  int32_t row, page;  // in device memory
  const auto find = [&](int box) {
    const int32_t key = first_key + box / PANELS * args.box_rows;
    if (p.block_table == nullptr) {
      row = tile.k_start + key;
      page = p.cu_seqlens_k != nullptr ? 0 : tile.seq_idx;
    } else {
      const int32_t idx = args.page_size.divide(key);
      row = key - idx * args.page_size.divisor;
      page = key < tile.k_len ? p.block_table[tile.seq_idx * p.block_table_stride + idx] : -1;
    }
  };
  constexpr bool ONE_EACH = PANELS * BLOCK_N / 8 <= 32;  // a box has 8 rows at least
  find(lane);                                            // before the wait: a table's entry takes its time
  empty.wait(parity ^ 1);
  __syncwarp();  // nobody may be two phases behind
  if (lane == 0) full.arrive_expect_bytes(PANELS * WIDTH * BLOCK_N * sizeof(T));
  for (int box = lane; box < PANELS * args.num_boxes; box += 32) {
    if (box >= 32) find(box);
    const int offset = box % PANELS * BLOCK_N + box / PANELS * args.box_rows;
    if constexpr (PACKS) {
      tma_load_4d(target + offset * WIDTH, map, full, box % PANELS * WIDTH, row, kv_head, page,
                  tile.k_len <= args.few_keys ? evict_first_policy() : evict_normal_policy());
    } else {
      tma_load_4d(target + offset * WIDTH, map, full, box % PANELS * WIDTH, row, kv_head, page);
    }
    if (ONE_EACH) break;
  }
}

// Reads the tiles in the order in which the producer hands them out, by a whole warp.
template <typename Storage>
struct FlashTileReader {
  Storage& smem;
  RingPosition<Storage::kTileStages> ring;

  __device__ __forceinline__ explicit FlashTileReader(Storage& s) : smem(s) {}

  // The tile in hand; it stays there until it is released.
  __device__ __forceinline__ const FlashTile& now() const { return smem.tile[ring.stage()]; }
  __device__ __forceinline__ const FlashTile& wait() const {
    smem.tile_full[ring.stage()].wait(ring.parity());
    return now();
  }
  __device__ __forceinline__ const FlashTile& wait_for_next() const {
    return FlashTileReader(smem, {ring.count + 1}).wait();
  }
  // Every lane says that it has read: once a tile that costs nothing, and it needs no order within the warp.
  __device__ __forceinline__ void release() {
    smem.tile_empty[ring.stage()].arrive();
    ring.advance();
  }
  // A copy. False if there are no more.
  __device__ __forceinline__ bool take(FlashTile& tile) {
    tile = wait();
    release();
    return tile.end_step >= 0;
  }

 private:
  __device__ __forceinline__ FlashTileReader(Storage& s, RingPosition<Storage::kTileStages> r) : smem(s), ring(r) {}
};

}  // namespace fastattn
