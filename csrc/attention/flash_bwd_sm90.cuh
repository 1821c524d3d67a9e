// Gradients of attention on Hopper's tensor cores and copy engine: one producer warp, two groups that compute.
//
//   p_ij  = exp(s_ij - lse_i)          s_ij as in flash_fwd_sm90.cuh, lse_i from there
//   dv_j  = sum_i p_ij dout_i          delta_i = sum_d dout_id out_id - dlse_i
//   ds_ij = p_ij (dout_i . v_j - delta_i), times softcap's derivative 1 - (s_ij / softcap)^2
//   dk_j  = softmax_scale * sum_i ds_ij q_i
//   dq_i  = softmax_scale * sum_j ds_ij k_j
//
// A CTA on each SM takes tile after tile of BLOCK_N keys of one KV head, and walks over all blocks of BLOCK_M = 64
// query rows that see them, of all query heads of the group, so that dK and dV are complete when it is done. A counter
// in device memory hands the tiles out.
//
// Scores are computed transposed, keys by rows: P and dS, rounded, are then the left operands of dV and dK where they
// are, in registers. For dQ, which sums over the keys, dS goes through shared memory.
//
//   warp group 0, warp 0      Q(0) K V dO(0) ─► Q(1) dO(1) ─► Q(2) dO(2) ─► … ─► next tile's
//     (the copy engine)         two or three stages of Q, two of dO; with them come a block's lse and delta
//
//   warp groups 1, 2          up to head dim 128 each has 64 keys of 128, and all columns; step j:
//     tensor cores   S(j) │         │ dP, dV += P dO │              │ dK += dS Q, dQ(j-1), S(j+1) │
//     the rest            │ P = exp │                │ dS ─► shared │                             │ dQ ─► memory
//
// The second group is half a step behind the first one: what one computes on its own takes place beside the other's
// products. dQ needs the dS of both, so it is a step late, for nobody to wait.
//
// Above 128 the gradients of 64 keys fill the registers of both groups: each has all 64 keys and half of the columns of
// dK, dV and dQ. The first one computes S and P, the second one dP and dS, and they exchange P and dS:
//
//     group 1   S(j) │ P ─► shared │ dV                │ dK, dQ, S(j+1)      │ dQ ─► memory
//     group 2   dP(j)              │ dS ─► shared │ dV, dK, dQ, dP(j+1)      │ dQ ─► memory
//
// The partial sums of dQ are added to fp32 numbers in memory. They lie there in the order in which the accumulators
// hold them: an addition is of 16 bytes a lane and 512 a warp, straight from registers, and a last kernel puts rows
// together, scales and rounds them.
//
// Registers hold dK, dV (64 x 64 to 128 each), S, dP or dQ (64 x 32 to 96 each) of a group, and P and dS rounded.
//
// Deterministic: contributions to a block of dQ take turns, in the order of the tiles' keys. Tiles are handed out in
// that order, so that whoever has to wait waits for a CTA that is running, and the first tile of all that are not done
// for none. A tile walks from the last block to the first: with a causal mask all of a pair's tiles begin there, and
// who comes later, with fewer blocks to see, is behind by a step, not by all the blocks that it does not see.
//
// Else a tile walks from the first block to the last of one head after the other; or of all heads together, up or down,
// where that keeps Q, dO and dQ in the L2 cache (heads_last, flash_bwd_sm90_config.h).
//
// Poison: rows behind the end of a sequence have lse = +inf and so P = 0, and are cleared in shared memory if the copy
// engine may have brought another sequence's; so are keys and values. What is left must be finite.
//
// Limits: D and Dv multiples of 8 up to 256, rows 16-byte aligned, softmax_scale > 0.
//
// One kernel for both kinds of step, and so a long file: all but the steps is the same.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "arch/global_memory.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/mbarrier.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/registers.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "attention/flash_bwd_sm90_storage.cuh"
#include "attention/softmax.cuh"

namespace fastattn {

template <typename T, int HEAD_DIM, bool DETERMINISTIC>
__global__ void __launch_bounds__(384, 1) flash_bwd_sm90_kernel(const __grid_constant__ FlashBwdSm90Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Storage = FlashBwdSm90Storage<T, HEAD_DIM>;
  constexpr int BLOCK_M = Storage::BLOCK_M, BLOCK_N = Storage::BLOCK_N, PANEL = Storage::PANEL;
  constexpr uint32_t Q_BYTES = BLOCK_M * HEAD_DIM * sizeof(T);
  constexpr uint32_t KV_BYTES = BLOCK_N * HEAD_DIM * sizeof(T);
  constexpr uint32_t DS_BYTES = BLOCK_N * BLOCK_M * sizeof(T);
  constexpr uint32_t ROW_BYTES = BLOCK_M * sizeof(float);
  // setmaxnreg; together at most 504 for a thread of each group.
  constexpr int PRODUCER_REGISTERS = HEAD_DIM % 128 == 0 ? 24 : 40;
  constexpr int CONSUMER_REGISTERS = HEAD_DIM % 128 == 0 ? 240 : 232;
  // Two groups share the work: each has 64 keys of a tile's 128, or, where the gradients of so many do not fit into
  // registers, half of the columns of all 64 (flash_bwd_sm90_column says which).
  constexpr bool SHARED_KEYS = Storage::kSharedKeys;
  constexpr int COLUMNS = SHARED_KEYS ? HEAD_DIM / 2 : HEAD_DIM;  // of dK and dV that a group has
  constexpr int DQ_COLUMNS = HEAD_DIM < 256 ? HEAD_DIM / 2 : 64;  // of dQ that it computes at a time
  constexpr int DQ_PARTS = HEAD_DIM / 2 / DQ_COLUMNS;
  constexpr int DQ_FLOATS = BLOCK_M * HEAD_DIM / 2;
  // Barriers of the SM; all but the first are pairs, one for each group.
  constexpr int kSecondGroupMayStart = 1, kRowsCleared = 2, kTurnOfGroup = 4;
  static_assert(BLOCK_M == 64 && (BLOCK_N == 128 || BLOCK_N == 64));

  extern __shared__ unsigned char smem_bytes[];
  unsigned char* const smem_bytes_aligned =
      reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(smem_bytes) + 1023) & ~uintptr_t{1023});
  Storage& smem = *reinterpret_cast<Storage*>(smem_bytes_aligned);
  const FlashBwdSm90Params& p = args.p;
  const bool heads_last = DETERMINISTIC || p.config.heads_last;
  const int group_idx = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const bool packed = p.cu_seqlens_q != nullptr;
  // Rows behind a sequence's end belong to another, or are unused. Behind the tensor's end the copy engine gives zeros.
  const bool q_ends_inside = packed || p.seqused_q != nullptr;
  const bool k_ends_inside = packed || p.seqused_k != nullptr;

  if (threadIdx.x == 0) {
    tma_prefetch_map(args.q);
    tma_prefetch_map(args.k);
    tma_prefetch_map(args.v);
    tma_prefetch_map(args.dout);
    tma_prefetch_map(args.lse_log2);
    tma_prefetch_map(args.delta);
    for (int i = 0; i < Storage::kStagesQ; ++i) {
      smem.q_full[i].init(1);
      smem.q_empty[i].init(8);
    }
    for (int i = 0; i < Storage::kStagesDo; ++i) {
      smem.dout_full[i].init(1);
      smem.dout_empty[i].init(8);
    }
    for (int i = 0; i < Storage::kStagesDs; ++i) {
      smem.ds_full[i].init(SHARED_KEYS ? 4 : 8);
      smem.ds_empty[i].init(8);
    }
    smem.probs_full.init(8);
    for (int i = 0; i < Storage::kStagesK; ++i) {
      smem.k_full[i].init(1);
      smem.k_empty[i].init(8);
    }
    smem.v_full.init(1);
    smem.v_empty.init(SHARED_KEYS ? 4 : 8);
    for (int i = 0; i < Storage::kTileStages; ++i) {
      smem.tile_full[i].init(1);
      smem.tile_empty[i].init(8);
    }
    fence_barrier_init();
  }
  __syncthreads();
  grid_dependency_launch();
  grid_dependency_wait();

  RingPosition<Storage::kStagesQ> q_ring;
  RingPosition<Storage::kStagesDo> dout_ring;
  RingPosition<Storage::kStagesK> k_ring;
  RingPosition<1> v_ring;
  RingPosition<Storage::kStagesDs> ds_ring, dq_ring;
  RingPosition<Storage::kTileStages> tile_ring;

  if (group_idx == 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (warp_idx == 0 && lane == 0) {
      // ----------------------------------------------------------------------------- producer
      FlashBwdTile tile;
      int32_t tile_idx = -1;
      const auto publish = [&] {
        smem.tile_empty[tile_ring.stage()].wait(tile_ring.parity() ^ 1);
        smem.tile[tile_ring.stage()] = tile;
        smem.tile_full[tile_ring.stage()].arrive();
        tile_ring.advance();
      };
      while (true) {
        tile_idx = tile_idx < 0 ? static_cast<int32_t>(blockIdx.x)
                                : static_cast<int32_t>(gridDim.x) + count_up(p.tile_counter);
        if (tile_idx >= args.num_tiles) break;
        if (!decode_tile<BLOCK_M, BLOCK_N>(args, tile_idx, tile)) continue;
        publish();
        bool first = true;
        const auto load_block = [&](int32_t head_of_group, int32_t block) {
          const int32_t head_idx = tile.kv_head_idx * args.group_size.divisor + head_of_group;
          const int32_t workspace_block = tile.first_block + block;  // of the head
          smem.q_empty[q_ring.stage()].wait(q_ring.parity() ^ 1);
          MBarrier& q_full = smem.q_full[q_ring.stage()];
          q_full.arrive_expect_bytes(Q_BYTES + ROW_BYTES);
#pragma unroll
          for (int panel = 0; panel < HEAD_DIM / PANEL; ++panel) {
            tma_load_4d(smem.q[q_ring.stage()] + panel * BLOCK_M * PANEL, args.q, q_full, panel * PANEL,
                        tile.q_start + block * BLOCK_M, head_idx, packed ? 0 : tile.seq_idx);
          }
          tma_load_4d(smem.lse_log2[q_ring.stage()], args.lse_log2, q_full, 0, workspace_block, head_idx, 0);
          q_ring.advance();
          if (first) {
            first = false;
            MBarrier& k_full = smem.k_full[k_ring.stage()];
            smem.k_empty[k_ring.stage()].wait(k_ring.parity() ^ 1);
            k_full.arrive_expect_bytes(KV_BYTES);
#pragma unroll
            for (int panel = 0; panel < HEAD_DIM / PANEL; ++panel) {
              tma_load_4d(smem.k[k_ring.stage()] + panel * BLOCK_N * PANEL, args.k, k_full, panel * PANEL,
                          tile.k_start + tile.first_key, tile.kv_head_idx, packed ? 0 : tile.seq_idx);
            }
            k_ring.advance();
            smem.v_empty.wait(v_ring.parity() ^ 1);
            smem.v_full.arrive_expect_bytes(KV_BYTES);
#pragma unroll
            for (int panel = 0; panel < HEAD_DIM / PANEL; ++panel) {
              tma_load_4d(smem.v + panel * BLOCK_N * PANEL, args.v, smem.v_full, panel * PANEL,
                          tile.k_start + tile.first_key, tile.kv_head_idx, packed ? 0 : tile.seq_idx);
            }
            v_ring.advance();
          }
          smem.dout_empty[dout_ring.stage()].wait(dout_ring.parity() ^ 1);
          MBarrier& dout_full = smem.dout_full[dout_ring.stage()];
          dout_full.arrive_expect_bytes(Q_BYTES + ROW_BYTES);
#pragma unroll
          for (int panel = 0; panel < HEAD_DIM / PANEL; ++panel) {
            tma_load_4d(smem.dout[dout_ring.stage()] + panel * BLOCK_M * PANEL, args.dout, dout_full, panel * PANEL,
                        tile.q_start + block * BLOCK_M, head_idx, packed ? 0 : tile.seq_idx);
          }
          tma_load_4d(smem.delta[dout_ring.stage()], args.delta, dout_full, 0, workspace_block, head_idx, 0);
          dout_ring.advance();
        };
        if (heads_last) {
          int32_t block = tile.direction > 0 ? tile.begin_block : tile.end_block - 1;
          for (int32_t num = tile.end_block - tile.begin_block; num > 0; --num, block += tile.direction) {
            for (int32_t i = 0; i < args.group_size.divisor; ++i) load_block(i, block);
          }
        } else {
          for (int32_t i = 0; i < args.group_size.divisor; ++i) {
            for (int32_t block = tile.begin_block; block < tile.end_block; ++block) load_block(i, block);
          }
        }
      }
      tile.more = 0;
      publish();
    }
    return;
  }

  // --------------------------------------------------------------------------------- consumers
  take_registers<CONSUMER_REGISTERS>();
  const int consumer = group_idx - 1;
  const int thread = threadIdx.x % 128;
  const int first_key_of_group = SHARED_KEYS ? 0 : consumer * 64;
  // A lane has this key of the tile, and the one 8 below.
  const int lane_key = first_key_of_group + warp_idx % 4 * 16 + lane / 4;
  const float scale_log2 = p.softcap > 0.0f ? kLog2E : p.softmax_scale * kLog2E;

  float dk[COLUMNS / 8][4], dv[COLUMNS / 8][4];
  float scores[BLOCK_M / 8][4];       // S^T, then P^T, then dS^T; or dP^T, then dS^T
  float dprobs[BLOCK_M / 8][4];       // dP^T
  uint32_t probs[BLOCK_M / 16][4];    // P^T rounded, as the left operand of dV
  uint32_t dscores[BLOCK_M / 16][4];  // dS^T likewise, of dK

  int32_t block = 0, head_idx = 0;  // what the step is about

  const auto release = [&](MBarrier& barrier) {  // each warp for itself
    if (lane == 0) barrier.arrive();
  };
  // Read again where it is needed: registers are short.
  const auto tile = [&](int32_t FlashBwdTile::* field) {
    return load_shared(shared_address(&(smem.tile[tile_ring.stage()].*field)));
  };
  // Blocks before `special_before` and from `special_from` on have scores of this group that are not simply products;
  // behind the `whole_blocks` there may be one with rows to clear.
  int32_t special_before, special_from, whole_blocks;
  int32_t begin_block, end_block;
  bool staggered;
  int32_t workspace_block = 0;                   // of `block`
  int32_t block_before, workspace_block_before;  // of the step before, whose dQ is still to come
  const auto end_tile = [&] {
    __syncwarp();
    release(smem.tile_empty[tile_ring.stage()]);
    tile_ring.advance();
  };

  const auto next_block = [&] {
    const int32_t blocks_of_head = static_cast<int32_t>(p.config.blocks_of_head), group = args.group_size.divisor;
    if (heads_last) {
      const bool new_block = head_idx + 1 == (tile(&FlashBwdTile::kv_head_idx) + 1) * group;
      const int32_t direction = new_block ? tile(&FlashBwdTile::direction) : 0;
      workspace_block += new_block ? direction - (group - 1) * blocks_of_head : blocks_of_head;
      head_idx += new_block ? 1 - group : 1;
      block += direction;
    } else {
      const bool new_head = block + 1 == end_block;
      const int32_t next = new_head ? begin_block : block + 1;
      workspace_block += next - block + (new_head ? blocks_of_head : 0);
      block = next;
      head_idx += new_head;
    }
  };

  // ---- products
  // Descriptors differ by constants: `at` is so many bytes from the beginning of shared memory.
  using Descriptor = WgmmaDescriptor;
  const Descriptor base = Descriptor::make<PANEL * 2>(smem_bytes_aligned, 0);
  const auto at = [&](uint32_t bytes, uint32_t leading_bytes) {
    return Descriptor{base.low + bytes / 16 + (leading_bytes / 16 << 16), base.high};
  };
  constexpr uint32_t PANEL_BYTES = PANEL * 2, GROUP_ROWS = 64 * PANEL_BYTES, DS_ROW_BYTES = BLOCK_M * 2;
  const uint32_t rows_of_group = SHARED_KEYS ? 0 : consumer * GROUP_ROWS;
  // Half of the columns: where they begin, and how far the second panel is from the first one.
  constexpr int WHOLE_PANELS = HEAD_DIM / 2 / PANEL, HALF_BYTES = HEAD_DIM / 2 % PANEL * sizeof(T);
  static_assert(HALF_BYTES == 0 || WHOLE_PANELS <= 1);
  const auto half_of_columns = [&](uint32_t panel_bytes) {
    return at(consumer * (WHOLE_PANELS > 0 ? WHOLE_PANELS * panel_bytes : HALF_BYTES),
              HALF_BYTES > 0 ? (2 - consumer) * panel_bytes + consumer * HALF_BYTES : panel_bytes);
  };
  const Descriptor k_rows = at(offsetof(Storage, k) + rows_of_group, 0);
  const Descriptor v_rows = at(offsetof(Storage, v) + rows_of_group, 0);
  const Descriptor q_tiles = at(offsetof(Storage, q), 0);
  const Descriptor dout_tiles = at(offsetof(Storage, dout), 0);
  const Descriptor own_rows = consumer == 0 ? k_rows : v_rows, own_tiles = consumer == 0 ? q_tiles : dout_tiles;
  const auto moved = [&](const Descriptor& from, uint32_t bytes) {
    return Descriptor{from.low + bytes / 16, from.high};
  };
  const Descriptor own_columns = SHARED_KEYS ? half_of_columns(BLOCK_M * PANEL_BYTES) : at(0, BLOCK_M * PANEL_BYTES);
  const Descriptor q_columns = moved(own_columns, offsetof(Storage, q));
  const Descriptor dout_columns = moved(own_columns, offsetof(Storage, dout));
  const Descriptor k_columns = moved(half_of_columns(BLOCK_N * PANEL_BYTES), offsetof(Storage, k));
  const Descriptor ds_tiles =
      moved({base.low, Descriptor::make<DS_ROW_BYTES>(smem_bytes_aligned, 0).high}, offsetof(Storage, ds));

  // products of this group's 64 keys (or values) and the rows of a block: acc = A B^T
  const auto start_scores = [&](float (&acc)[BLOCK_M / 8][4], const WgmmaDescriptor& a, const WgmmaDescriptor& b) {
    pin_registers(acc);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < HEAD_DIM / 16; ++kk) {
      constexpr int STEPS = PANEL / 16;
      Wgmma<T, BLOCK_M>::ss(acc, a.plus((kk / STEPS * BLOCK_N * PANEL + kk % STEPS * 16) * sizeof(T)),
                            b.plus((kk / STEPS * BLOCK_M * PANEL + kk % STEPS * 16) * sizeof(T)), kk > 0);
    }
    wgmma_commit();
  };
  // acc += A B, A of scores' shape
  const auto start_gradient = [&](float (&acc)[COLUMNS / 8][4], uint32_t (&a)[BLOCK_M / 16][4],
                                  const WgmmaDescriptor& b, bool first) {
    pin_registers(acc);
    pin_registers(a);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < BLOCK_M / 16; ++kk) {
      Wgmma<T, COLUMNS>::rs(acc, a[kk], b.plus(kk * 16 * PANEL * sizeof(T)), kk > 0 || !first);
    }
    wgmma_commit();
  };

  // ---- loads
  // Clears rows of a tile from `begin` on: whole rows of a panel, so that the swizzle, which permutes within a row,
  // does not matter. Each group does it for itself, so as not to wait for the other one: zeros over zeros.
  const auto clear_rows = [&](T* rows, int num_rows, int32_t begin) {
#pragma unroll 1
    for (int panel = 0; panel < HEAD_DIM / PANEL; ++panel) {
      uint4* const chunks = reinterpret_cast<uint4*>(rows + panel * num_rows * PANEL);
      for (int32_t i = begin * (PANEL / 8) + thread; i < num_rows * (PANEL / 8); i += 128) {
        chunks[i] = make_uint4(0, 0, 0, 0);
      }
    }
    fence_proxy_async();
    named_barrier_sync(kRowsCleared + consumer, 128);
  };
  const auto wait_for_q = [&] {
    smem.q_full[q_ring.stage()].wait(q_ring.parity());
    if (block == whole_blocks) clear_rows(smem.q[q_ring.stage()], BLOCK_M, tile(&FlashBwdTile::q_len) % BLOCK_M);
  };
  const auto wait_for_dout = [&] {
    smem.dout_full[dout_ring.stage()].wait(dout_ring.parity());
    if (block == whole_blocks) clear_rows(smem.dout[dout_ring.stage()], BLOCK_M, tile(&FlashBwdTile::q_len) % BLOCK_M);
  };
  const auto clear_keys = [&](T* rows) {
    const int32_t keys = tile(&FlashBwdTile::k_len) - tile(&FlashBwdTile::first_key);
    if (k_ends_inside && keys < BLOCK_N) clear_rows(rows, BLOCK_N, keys);
  };
  const auto wait_for_k = [&] {
    smem.k_full[k_ring.stage()].wait(k_ring.parity());
    clear_keys(smem.k[k_ring.stage()]);
  };
  const auto wait_for_v = [&] {
    smem.v_full.wait(v_ring.parity());
    clear_keys(smem.v);
  };

  // ---- scores
  const uint32_t lse_of_lane = shared_address(smem.lse_log2[0]) + lane % 4 * 8;  // of two query rows
  const uint32_t delta_of_lane = shared_address(smem.delta[0]) + lane % 4 * 8;
  const auto begin_tile = [&] {
    const int32_t q_len = tile(&FlashBwdTile::q_len), k_len = tile(&FlashBwdTile::k_len);
    const int32_t first_key = tile(&FlashBwdTile::first_key) + first_key_of_group;
    const int32_t first_row = first_key - (k_len - q_len);  // that which stands at the first key
    special_before = 0;
    special_from = INT32_MAX;
    if (p.window_right >= 0) special_before = max(0, (first_row + 63 - p.window_right + BLOCK_M - 1) / BLOCK_M);
    if (p.window_left >= 0) special_from = max(0, (first_row + p.window_left + 1) / BLOCK_M);
    if (first_key + 64 > k_len || p.alibi_slopes != nullptr || p.softcap > 0.0f) special_before = INT32_MAX;
    whole_blocks = q_ends_inside ? q_len / BLOCK_M : -1;
    block = heads_last && tile(&FlashBwdTile::direction) < 0 ? end_block - 1 : begin_block;
    head_idx = tile(&FlashBwdTile::kv_head_idx) * args.group_size.divisor;
    workspace_block =
        head_idx * static_cast<int32_t>(p.config.blocks_of_head) + tile(&FlashBwdTile::first_block) + block;
  };
  const auto slope_of_alibi = [&] {  // in scores' unit
    if (p.alibi_slopes == nullptr) return 0.0f;
    return p.alibi_slopes[tile(&FlashBwdTile::seq_idx) * p.alibi_batch_stride + head_idx] * (kLog2E / scale_log2);
  };
  // Softcap, ALiBi and mask.
  const auto finish_scores = [&] {
    if (p.softcap > 0.0f) {
      const float scale = p.softmax_scale / p.softcap;
#pragma unroll
      for (int t = 0; t < BLOCK_M / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[t][i] = p.softcap * tanh_exp2(scores[t][i] * scale);
      }
    }
    const int32_t shift = tile(&FlashBwdTile::k_len) - tile(&FlashBwdTile::q_len);
    const int32_t first_row = block * BLOCK_M + 2 * (lane % 4);  // this lane's
    const float slope = slope_of_alibi();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t key = tile(&FlashBwdTile::first_key) + lane_key + 8 * r;
      int32_t begin = 0, end = key < tile(&FlashBwdTile::k_len) ? BLOCK_M : 0;  // columns that see the key
      if (p.window_right >= 0) begin = key - shift - p.window_right - first_row;
      if (p.window_left >= 0) end = min(end, key - shift + p.window_left + 1 - first_row);
#pragma unroll
      for (int t = 0; t < BLOCK_M / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int32_t column = t * 8 + i;
          float& score = scores[t][2 * r + i];
          if (slope != 0.0f) score -= slope * fabsf(static_cast<float>(first_row + column + shift - key));
          if (column < begin || column >= end) score = -INFINITY;
        }
      }
    }
  };
  const auto exponentials = [&] {
#pragma unroll
    for (int t = 0; t < BLOCK_M / 8; ++t) {
      const float2 lse = load_shared_pair(lse_of_lane + q_ring.stage() * ROW_BYTES + t * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[t][i] = exp2_approx(fmaf(scores[t][i], scale_log2, i & 1 ? -lse.y : -lse.x));
      }
    }
  };
  // P to P (1 - (s / softcap)^2). The score is got back from P, so as not to be kept; where P is 0, it doesn't matter.
  const auto multiply_by_slope_of_cap = [&](float (&probs)[BLOCK_M / 8][4]) {
    const float slope = slope_of_alibi() * kLog2E, inverse = 1.0f / (p.softcap * kLog2E);
    const int32_t first_distance = block * BLOCK_M + 2 * (lane % 4) + tile(&FlashBwdTile::k_len) -
                                   tile(&FlashBwdTile::q_len) - tile(&FlashBwdTile::first_key) - lane_key;
#pragma unroll
    for (int t = 0; t < BLOCK_M / 8; ++t) {
      const float2 lse = load_shared_pair(lse_of_lane + q_ring.stage() * ROW_BYTES + t * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t distance = first_distance + t * 8 + (i & 1) - 8 * (i >> 1);
        const float score = log2f(probs[t][i]) + (i & 1 ? lse.y : lse.x) + slope * fabsf(static_cast<float>(distance));
        const float tanh = fminf(fmaxf(score * inverse, -1.0f), 1.0f);
        probs[t][i] *= 1.0f - tanh * tanh;
      }
    }
  };
  const auto round_to = [&](uint32_t (&fragments)[BLOCK_M / 16][4]) {
#pragma unroll
    for (int kk = 0; kk < BLOCK_M / 16; ++kk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        fragments[kk][i] = pack_pair<T>(scores[2 * kk + i / 2][i % 2 * 2], scores[2 * kk + i / 2][i % 2 * 2 + 1]);
      }
    }
  };

  // Fragments to a tile of shared memory, keys by queries, and back.
  const auto place_of_fragment = [&](int kk) {
    const int row = lane % 16 + first_key_of_group + warp_idx % 4 * 16;
    const int chunk = 2 * kk + lane / 16;  // of eight queries
    return row * DS_ROW_BYTES + ((chunk ^ row) % 8) * 16;
  };
  const auto store_fragments = [&](T* tile, const uint32_t (&fragments)[BLOCK_M / 16][4]) {
#pragma unroll
    for (int kk = 0; kk < BLOCK_M / 16; ++kk) {
      store_matrices(shared_address(tile) + place_of_fragment(kk), fragments[kk]);
    }
  };
  const auto load_fragments = [&](const T* tile, uint32_t (&fragments)[BLOCK_M / 16][4]) {
#pragma unroll
    for (int kk = 0; kk < BLOCK_M / 16; ++kk) ldmatrix_x4(fragments[kk], shared_address(tile) + place_of_fragment(kk));
  };

  // ---- turns, if deterministic
  const auto wait_for_turn = [&](const int32_t* turns, int32_t of_block) {
    if (thread == 0) {
      int32_t turn = tile(&FlashBwdTile::first_key) / BLOCK_N;  // how many tiles before this one add to the block
      if (p.window_left >= 0) {
        turn -= max(0, of_block * BLOCK_M + tile(&FlashBwdTile::k_len) - tile(&FlashBwdTile::q_len) - p.window_left) /
                BLOCK_N;
      }
      while (load_acquire(turns) != turn) {
      }
    }
    named_barrier_sync(kTurnOfGroup + consumer, 128);
  };
  const auto end_turn = [&](int32_t* turns) {
    __threadfence();
    named_barrier_sync(kTurnOfGroup + consumer, 128);
    if (thread == 0) add_release(turns, 1);
  };

  // ---- the end of a tile: acc * scale, rounded
  const auto store = [&](const float (&acc)[COLUMNS / 8][4], void* gradient, int32_t head_dim, float scale,
                         bool empty) {
    const int64_t start = packed ? tile(&FlashBwdTile::k_start) : tile(&FlashBwdTile::seq_idx) * p.k_tokens;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t key = tile(&FlashBwdTile::first_key) + lane_key + 8 * r;
      const bool valid = key < tile(&FlashBwdTile::k_allocated);
      T* const row =
          static_cast<T*>(gradient) + ((start + key) * p.num_kv_heads + tile(&FlashBwdTile::kv_head_idx)) * head_dim;
#pragma unroll
      for (int t = 0; t < COLUMNS / 8; t += 4) {
        uint32_t w[4] = {0, 0, 0, 0};
        if (!empty) {
#pragma unroll
          for (int i = 0; i < 4; ++i) w[i] = pack_pair<T>(acc[t + i][2 * r] * scale, acc[t + i][2 * r + 1] * scale);
          gather_columns(w, lane);
        }
        const int own_column = (t + lane % 4) * 8;
        const int column = SHARED_KEYS ? flash_bwd_sm90_column(HEAD_DIM, consumer, own_column) : own_column;
        if (valid && column < head_dim) *reinterpret_cast<uint4*>(row + column) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  };

  // ---- a step
  float dq[DQ_COLUMNS / 8][4];
  const auto start_dq = [&](float (&sums)[DQ_COLUMNS / 8][4], uint32_t ds_stage, int part) {
    const auto ds = ds_tiles.uniform_plus(ds_stage * DS_BYTES);
    const auto k = k_columns.uniform_plus(k_ring.stage() * KV_BYTES + part * BLOCK_N * PANEL_BYTES);
    pin_registers(sums);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < BLOCK_N / 16; ++kk) {
      Wgmma<T, DQ_COLUMNS>::ss_mn(sums, ds.plus(kk * 16 * DS_ROW_BYTES), k.plus(kk * 16 * PANEL_BYTES), kk > 0);
    }
    wgmma_commit();
  };
  const auto add_dq = [&](float (&sums)[DQ_COLUMNS / 8][4], int32_t of_block, int32_t of_workspace_block, int part) {
    pin_registers(sums);
    const int64_t share = static_cast<int64_t>(of_workspace_block) * 2 + consumer;
    float* const memory = p.dq_sum + share * DQ_FLOATS + part * (DQ_COLUMNS / 8 * 512) + thread * 4;
    if constexpr (DETERMINISTIC) {
      if (part == 0) wait_for_turn(p.turns + share, of_block);
    }
#pragma unroll
    for (int t = 0; t < DQ_COLUMNS / 8; ++t) add_to_global(memory + t * 512, sums[t]);
    if constexpr (DETERMINISTIC) {
      if (part == DQ_PARTS - 1) end_turn(p.turns + share);
    }
  };
  // dQ of the step whose dS, both groups', is the next in the ring.
  const auto start_next_dq = [&] {
    smem.ds_full[dq_ring.stage()].wait(dq_ring.parity());
    start_dq(dq, dq_ring.stage(), 0);
  };
  const auto add_next_dq = [&](int32_t of_block, int32_t of_workspace_block) {
    release(smem.ds_empty[dq_ring.stage()]);
    dq_ring.advance();
    add_dq(dq, of_block, of_workspace_block, 0);
  };
  // In flight before it: S. After it: S of the next step, except for a tile's last one.
  const auto run_step = [&](auto is_first, auto is_last) {
    constexpr bool kFirst = decltype(is_first)::value, kLast = decltype(is_last)::value;
    wgmma_wait<0>();
    pin_registers(scores);
    if (block < special_before || block >= special_from) finish_scores();
    exponentials();
    round_to(probs);
    if (p.softcap > 0.0f) multiply_by_slope_of_cap(scores);
    if constexpr (kFirst) wait_for_v();
    wait_for_dout();
    const auto dout = dout_tiles.uniform_plus(dout_ring.stage() * Q_BYTES);
    start_scores(dprobs, v_rows.uniform_plus(0), dout);
    start_gradient(dv, probs, dout_columns.uniform_plus(dout_ring.stage() * Q_BYTES), kFirst);
    wgmma_wait<1>();
    pin_registers(dprobs);
    if constexpr (kLast) release(smem.v_empty);
#pragma unroll
    for (int t = 0; t < BLOCK_M / 8; ++t) {
      const float2 delta = load_shared_pair(delta_of_lane + dout_ring.stage() * ROW_BYTES + t * 32);
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[t][i] *= dprobs[t][i] - (i & 1 ? delta.y : delta.x);
    }
    round_to(dscores);
    const uint32_t ds_stage = ds_ring.stage();
    smem.ds_empty[ds_stage].wait(ds_ring.parity() ^ 1);
    store_fragments(smem.ds[ds_stage], dscores);
    fence_proxy_async();
    __syncwarp();
    release(smem.ds_full[ds_stage]);
    ds_ring.advance();
    if constexpr (kFirst) {
      if (consumer == 0 && staggered) named_barrier_arrive(kSecondGroupMayStart, 256);
    }
    wgmma_wait<0>();
    pin_registers(dv);
    pin_registers(probs);
    release(smem.dout_empty[dout_ring.stage()]);
    dout_ring.advance();

    start_gradient(dk, dscores, q_columns.uniform_plus(q_ring.stage() * Q_BYTES), kFirst);
    if constexpr (!kFirst) start_next_dq();  // of the step before, so as not to wait for the other group
    const int32_t dq_block = block_before, dq_workspace_block = workspace_block_before;
    block_before = block;
    workspace_block_before = workspace_block;
    if constexpr (kLast) {
      wgmma_wait<0>();
      release(smem.q_empty[q_ring.stage()]);
      q_ring.advance();
    } else {
      next_block();
      q_ring.advance();
      wait_for_q();
      start_scores(scores, k_rows.uniform_plus(k_ring.stage() * KV_BYTES),
                   q_tiles.uniform_plus(q_ring.stage() * Q_BYTES));
      wgmma_wait<1>();
      release(smem.q_empty[(q_ring.count - 1) % Storage::kStagesQ]);
    }
    pin_registers(dk);
    pin_registers(dscores);
    if constexpr (!kFirst) add_next_dq(dq_block, dq_workspace_block);
  };

  // The step where both groups have all keys: the first one computes S and P, the second one dP and dS. P and dS have
  // one place each: whoever writes there again has waited for what the other group made of it, and for a later product
  // of its own than those that read it. dS is read by the second group's own warps too, each in its own time: so they
  // count at the barrier of P, behind which they write dS.
  // In flight before it: S or dP. After it: that of the next step, except for a tile's last one.
  const auto wait_for_rows = [&] { consumer == 0 ? wait_for_q() : wait_for_dout(); };
  const auto start_own_scores = [&] {
    const uint32_t stage = consumer == 0 ? q_ring.stage() : dout_ring.stage();
    start_scores(scores, own_rows.uniform_plus(0), own_tiles.uniform_plus(stage * Q_BYTES));
  };
  const auto run_shared_step = [&](auto is_first, auto is_last) {
    constexpr bool kFirst = decltype(is_first)::value, kLast = decltype(is_last)::value;
    const uint32_t step = q_ring.count;  // of the CTA; dout_ring's too
    wgmma_wait<0>();
    pin_registers(scores);
    if (consumer == 0) {
      if (block < special_before || block >= special_from) finish_scores();
      exponentials();
      round_to(probs);
      store_fragments(smem.probs, probs);
      __syncwarp();
      release(smem.probs_full);
      wait_for_dout();
    } else {
      if constexpr (kLast) release(smem.v_empty);
      release(smem.probs_full);  // this warp's last dQ is done, which read what all warps of its group are to overwrite
      smem.probs_full.wait(step % 2);
      load_fragments(smem.probs, probs);
      wait_for_q();
      float unpacked[BLOCK_M / 8][4];
#pragma unroll
      for (int t = 0; t < BLOCK_M / 8; ++t) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 pair = unpack_pair<T>(probs[t / 2][t % 2 * 2 + r]);
          unpacked[t][2 * r] = pair.x;
          unpacked[t][2 * r + 1] = pair.y;
        }
      }
      if (p.softcap > 0.0f) multiply_by_slope_of_cap(unpacked);
#pragma unroll
      for (int t = 0; t < BLOCK_M / 8; ++t) {
        const float2 delta = load_shared_pair(delta_of_lane + dout_ring.stage() * ROW_BYTES + t * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[t][i] = unpacked[t][i] * (scores[t][i] - (i & 1 ? delta.y : delta.x));
      }
      round_to(dscores);
      store_fragments(smem.ds[0], dscores);
      fence_proxy_async();
      __syncwarp();
      release(smem.ds_full[0]);
    }
    start_gradient(dv, probs, dout_columns.uniform_plus(dout_ring.stage() * Q_BYTES), kFirst);
    smem.ds_full[0].wait(step % 2);
    if (consumer == 0) load_fragments(smem.ds[0], dscores);
    start_gradient(dk, dscores, q_columns.uniform_plus(q_ring.stage() * Q_BYTES), kFirst);
    wgmma_wait<1>();  // with dV in flight too, ptxas has too few registers and serializes
    pin_registers(dv);
    pin_registers(probs);
    release(smem.dout_empty[step % Storage::kStagesDo]);
    const int32_t dq_block = block, dq_workspace_block = workspace_block;
#pragma unroll
    for (int part = 0; part + 1 < DQ_PARTS; ++part) {  // all but the last one, which runs together with the next scores
      start_dq(dq, 0, part);
      wgmma_wait<0>();
      add_dq(dq, dq_block, dq_workspace_block, part);
    }
    start_dq(dq, 0, DQ_PARTS - 1);
    if constexpr (kLast) {
      wgmma_wait<0>();
    } else {
      next_block();
      (consumer == 0 ? q_ring.count : dout_ring.count) = step + 1;
      wait_for_rows();
      start_own_scores();
      wgmma_wait<1>();
    }
    pin_registers(dk);
    pin_registers(dscores);
    release(smem.q_empty[step % Storage::kStagesQ]);
    q_ring.count = dout_ring.count = step + 1;
    add_dq(dq, dq_block, dq_workspace_block, DQ_PARTS - 1);
  };

  // ---- main loop
  const auto run_steps = [&](int32_t num_steps, const auto& step) {
    if (num_steps == 1) {
      step(std::true_type(), std::true_type());
      return;
    }
    step(std::true_type(), std::false_type());
#pragma unroll 1
    for (int32_t i = 2; i < num_steps; ++i) step(std::false_type(), std::false_type());
    step(std::false_type(), std::true_type());
  };
  while (true) {
    smem.tile_full[tile_ring.stage()].wait(tile_ring.parity());
    if (!tile(&FlashBwdTile::more)) break;
    begin_block = tile(&FlashBwdTile::begin_block);
    end_block = tile(&FlashBwdTile::end_block);
    if (begin_block == end_block) {
      store(dk, p.dk, p.head_dim, 0.0f, true);
      store(dv, p.dv, p.v_head_dim, 0.0f, true);
      end_tile();
      continue;
    }

    begin_tile();
    const int32_t num_steps = (end_block - begin_block) * args.group_size.divisor;
    if constexpr (SHARED_KEYS) {
      wait_for_rows();
      consumer == 0 ? wait_for_k() : wait_for_v();
      start_own_scores();
      if (consumer == 1) wait_for_k();
      run_steps(num_steps, run_shared_step);
    } else {
      wait_for_q();
      wait_for_k();
      // The second group begins when the first one has its first dS, and they stay half a step apart: while one
      // computes on its own, the other's products run. In a short tile that is not worth the wait; how short, is
      // measured.
      staggered = num_steps >= (HEAD_DIM == 128 || (HEAD_DIM == 64 && p.window_right >= 0) ? 32 : 8);
      if (consumer == 1 && staggered) named_barrier_sync(kSecondGroupMayStart, 256);
      start_scores(scores, k_rows.uniform_plus(k_ring.stage() * KV_BYTES),
                   q_tiles.uniform_plus(q_ring.stage() * Q_BYTES));
      run_steps(num_steps, run_step);
      start_next_dq();
      wgmma_wait<0>();
      add_next_dq(block_before, workspace_block_before);
    }
    release(smem.k_empty[k_ring.stage()]);
    k_ring.advance();
    v_ring.advance();
    store(dv, p.dv, p.v_head_dim, 1.0f, false);
    store(dk, p.dk, p.head_dim, p.softmax_scale, false);
    end_tile();
  }
#else
  __trap();  // compiled for a target without wgmma: never launched, and never silent
#endif
}

}  // namespace fastattn
