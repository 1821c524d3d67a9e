// FlashAttention forward on Hopper's tensor cores and copy engine: warps that fetch, two or three groups that compute.
//
//   out[i, h, :] = sum_j p_ij v[j, h / G, :],  p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)
//   s_ij = softmax_scale * q[i, h, :] . k[j, h / G, :],  then softcap * tanh(s / softcap),
//          then - alibi_slope[h] * |i + Sk - Sq - j|,  then masked;  sinks: exp(sink[h]) is one more term of the sum
//
//   q (B, Sq, H, D)   k (B, Sk, Hk, D)   v (B, Sk, Hk, Dv)   G = H / Hk   out (B, Sq, H, Dv)   lse (B, H, Sq) fp32
//   packed: no B      paged: k and v (pages, page size, Hk, D), where a block table says; with out_scale, out is e4m3,
//                            of what it would be divided by that
//
// A CTA on each SM takes tile after tile of BLOCK_M = 64 * NUM_CONSUMERS query rows of one head, and walks over the key
// blocks that they see from the last to the first. A counter in device memory hands the tiles out; beside the decode
// kernel, which leaves SMs late, the first ones too.
//
//   warp group 0, warp 0      tile t, its Q ─► tile t+1, its Q ─► …
//     warp 1                  clears what a V block holds behind the end of its sequence
//     warp 2                  K(n) K(n-1) … K(0) ─► K(n) of tile t+1 …      two stages, or four where there is room
//     warp 3                  V(n) V(n-1) … V(0) ─► V(n) of tile t+1 …      the same
//     fp8, pages of 8 bits: warp 0        Q, K and V
//       warps 1 to 3          turn V around (flash_fwd_sm90_fp8.cuh), or widen K and V (flash_fwd_sm90_8bit.cuh)
//
//   warp groups 1, 2 (, 3)    64 rows each, step j:
//     tensor cores   │ S(j+1) = Q K^T │ O += P(j) V │                 │ S(j+2) = Q K^T │ O += P(j+1) V │
//     the rest                        │ P(j+1) = exp(S(j+1)) │ round  │                │ P(j+2) = …
//
// While one group's exponentials run, another's products do: two groups issue theirs in turns, three find their own
// way. Between two tiles the last O of one and the first S of the next are in flight together, and O is written while S
// is computed.
//
// The maximum of a row is looked for in its first block, in blocks with a mask, and where it must be. Else the
// reference of the exponentials stays what it was: it may be far below the maximum, since P, O and the sums are
// floating-point numbers and lose nothing by being large, until they overflow. Their sum tells, before P is used; then
// S is computed again. So the common step has neither a maximum, nor a reduction over lanes, nor a rescaled O.
//
// Where each head has few rows, a tile packs the query heads of a KV head (PACKS): row r is of token r / G and head r %
// G.
//
// Where there are fewer tiles than SMs, the key blocks of a tile are split among several CTAs, and flash_combine adds
// up.
//
// Registers hold O (64 x D), S (64 x BLOCK_N) and P of a group; P feeds the second product from there. Shared memory:
// Q, K and V as panels of 128 (or 64) bytes of a row with the swizzle that wgmma reads. Rows leave through shared
// memory, each warp's for itself and in whole lines, where that is faster; else straight from registers, 64 bytes at a
// time. Not by the copy engine, so that packed sequences need no care about whose rows a tile's end would overwrite.
//
// Poison: keys behind the end of a sequence are loaded with their block, but masked in S and zero in V. Of the keys
// that belong to a sequence, those in blocks that a row's tile walks over must be finite (0 * NaN is NaN).
//
// Limits: D and Dv multiples of 8 up to 256, rows 16-byte aligned, softmax_scale > 0. What was tried is in
// docs/design/flash_fwd_sm90.md.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <type_traits>

#include "arch/e4m3.cuh"
#include "arch/global_memory.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/mbarrier.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/registers.cuh"
#include "arch/tma.cuh"
#include "arch/wgmma.cuh"
#include "attention/flash_fwd_sm90_8bit.cuh"
#include "attention/flash_fwd_sm90_fp8.cuh"
#include "attention/flash_fwd_sm90_storage.cuh"
#include "attention/flash_fwd_sm90_tiles.cuh"
#include "attention/softmax.cuh"

namespace fastattn {

// EXTRAS: softcap, ALiBi, sinks, seqused_q and out_scale, whose code the others should not have to fetch. EIGHTS: a
// copy brings eight rows of a page, all of their panels, of K and V.
template <typename Input, int HEAD_DIM, int V_HEAD_DIM, int NUM_CONSUMERS, int BLOCK_N, bool EXTRAS, bool WIDENS,
          bool PACKS, bool EIGHTS>
__global__ void __launch_bounds__(128 * (NUM_CONSUMERS + 1), 1)
    flash_fwd_sm90_kernel(const __grid_constant__ FlashFwdSm90Args args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using T = std::conditional_t<WIDENS, __half, Input>;  // of the products
  using Storage = FlashFwdSm90StorageOf<T, HEAD_DIM, V_HEAD_DIM, NUM_CONSUMERS, BLOCK_N, WIDENS>;
  using Out = std::conditional_t<sizeof(T) == 1, __nv_bfloat16, Input>;
  constexpr bool CONVERTS_Q = !std::is_same_v<T, Input>;
  constexpr float QUERY_UNIT = CONVERTS_Q ? 1.0f / kWidenedQueryScale : 1.0f;
  constexpr bool FP8 = sizeof(T) == 1;
  static_assert(!WIDENS || (!FP8 && HEAD_DIM == V_HEAD_DIM));
  static_assert(!EIGHTS || (!FP8 && !WIDENS));
  constexpr int NUM_TURNERS = FP8 ? 3 : 0;     // warps
  constexpr bool HAS_HELPERS = FP8 || WIDENS;  // warps 1 to 3: turners, or wideners
  constexpr int BLOCK_M = Storage::BLOCK_M;
  constexpr int STAGES = Storage::kStages;
  constexpr int PANEL = kPanelOf<T, HEAD_DIM>, V_PANEL = kPanelOf<T, V_HEAD_DIM>;
  constexpr int STORED_DIM = kStoredDim<T, HEAD_DIM>, V_STORED_DIM = kStoredDim<T, V_HEAD_DIM>;
  // Of K and V in shared memory: panels, and how many rows of one lie there before the next one's.
  constexpr int PANELS = STORED_DIM / PANEL, V_PANELS = V_STORED_DIM / V_PANEL;
  constexpr int PANEL_ROWS = EIGHTS ? 8 : BLOCK_N;
  constexpr uint32_t Q_BYTES = BLOCK_M * STORED_DIM * sizeof(T);
  constexpr uint32_t K_BYTES = BLOCK_N * STORED_DIM * sizeof(T);
  // setmaxnreg; together at most 504 (with three groups 512) for a thread of each group.
  // Turners have 56 beside two groups, beside three 48 where these leave them so many, else 32, of which they spill
  // four.
  constexpr bool MORE_REGISTERS = WIDENS || (FP8 && NUM_CONSUMERS == 3 && V_HEAD_DIM <= 80);
  constexpr int PRODUCER_REGISTERS = (MORE_REGISTERS ? 16 : 0) + (NUM_CONSUMERS == 2 ? 56 : 32);
  constexpr int CONSUMER_REGISTERS = (504 + 8 * (NUM_CONSUMERS - 2) - PRODUCER_REGISTERS) / NUM_CONSUMERS / 8 * 8;
  constexpr bool TURNS = !FP8 && NUM_CONSUMERS == 2;
  constexpr int kVoteOfGroup = 1, kTurnOfGroup = 4, kFactorsOfWideners = 7;  // barriers of the SM, one for each group
  // Of a lane's share of a row of P: fp16 ends at 65504, bf16 and fp32 at 2^127, of which O needs the rest.
  constexpr float LARGEST_SUM = std::is_same_v<T, __half> ? 0x1p15f : 0x1p60f;
  // P of the reference is 2^this: e4m3 has little below 1.
  constexpr float REFERENCE_LOG2 = FP8 ? 8.0f : 0.0f;
  // Shorter code for maxima and for rescaling, with which three groups were slower; extras have no registers for it.
  constexpr bool SHORT_MAX = FP8 && NUM_CONSUMERS == 2 && !EXTRAS;
  constexpr bool LOCATES_AHEAD = FP8 && !EXTRAS && HEAD_DIM <= 128;
  constexpr bool STAGES_ROWS = Storage::kStagedColumns > 0 && !EXTRAS && !PACKS;
  static_assert(NUM_CONSUMERS == 2 || NUM_CONSUMERS == 3);
  constexpr int K = 32 / sizeof(T);  // what a product sums over
  static_assert(HEAD_DIM % K == 0 && V_HEAD_DIM % 16 == 0 && BLOCK_N % K == 0 && Storage::kStagedColumns % 16 == 0);

  extern __shared__ __align__(1024) unsigned char smem_bytes[];  // so that addresses in it are constants
  Storage& smem = *reinterpret_cast<Storage*>(smem_bytes);
  const FlashFwdSm90Params& p = args.p;
  const int group_idx = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int lane = threadIdx.x % 32;
  const bool has_factors = WIDENS && p.k_scale.data != nullptr;  // of each token
  const bool has_alibi = EXTRAS && p.alibi_slopes != nullptr;
  const bool has_softcap = EXTRAS && p.softcap > 0.0f;
  const bool in_e4m3 = EXTRAS && !FP8 && HEAD_DIM == V_HEAD_DIM && p.out_scale != nullptr;  // out
  const bool never_plain = has_softcap || has_alibi;  // find_max must see every block, and scales what it sees
  const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
  // Keys behind a sequence's end belong to another, or are unused. Behind the tensor's end the copy engine gives zeros.
  const bool ends_inside = packed_k || p.seqused_k != nullptr;  // a paged cache has the latter

  if (shared_address(smem_bytes) % 1024 != 0) __trap();  // the swizzle would be another
  if (threadIdx.x == 0) {
    tma_prefetch_map(args.q);
    tma_prefetch_map(args.k);
    tma_prefetch_map(args.v);
    for (int i = 0; i < Storage::kStagesQ; ++i) {
      smem.q_full[i].init(CONVERTS_Q ? kWideners : 1);
      smem.q_empty[i].init(4 * NUM_CONSUMERS);
    }
    for (int i = 0; i < STAGES; ++i) {
      smem.k_full[i].init(WIDENS ? 32 * kWideners : 1);
      smem.v_full[i].init(FP8 ? NUM_TURNERS : WIDENS ? 32 * kWideners : 1);
      if constexpr (FP8) smem.v_turned[i].init(NUM_TURNERS);
      smem.v_loaded[i].init(1);
      smem.k_empty[i].init(4 * NUM_CONSUMERS);
      smem.v_empty[i].init(4 * NUM_CONSUMERS);
    }
    if constexpr (WIDENS) {
      for (int i = 0; i < Storage::Sizes::kStagesRaw; ++i) {
        smem.raw_full[i].init(1);
        smem.raw_empty[i].init(kWideners);
      }
      for (int i = 0; i < Storage::kStagesQ; ++i) smem.q_loaded[i].init(1);
    }
    for (int i = 0; i < Storage::kTileStages; ++i) {
      smem.tile_full[i].init(1);
      smem.tile_empty[i].init(32 * (4 * NUM_CONSUMERS + (HAS_HELPERS || ends_inside ? 3 : 2)));
    }
    smem.tile_ends.init(1);
    fence_barrier_init();
  }
  __syncthreads();

  RingPosition<Storage::kStagesQ> q_ring;
  RingPosition<STAGES> k_ring, v_ring;

  if (group_idx == 0) {
    give_registers<PRODUCER_REGISTERS>();
    FlashTile tile;
    const auto load_k = [&](const FlashTile& t, int32_t step) {
      const uint32_t stage = k_ring.stage();
      load_block<STORED_DIM / PANEL, PANEL, BLOCK_N, PACKS, EIGHTS>(args, args.k, smem.k[stage], smem.k_empty[stage],
                                                                    smem.k_full[stage], k_ring.parity(), t, step);
      k_ring.advance();
    };
    const auto load_v = [&](const FlashTile& t, int32_t step) {
      const uint32_t stage = v_ring.stage();
      T* target = smem.v[stage];
      MBarrier *empty = &smem.v_empty[stage], *full = &smem.v_full[stage];
      if constexpr (FP8) {
        target = reinterpret_cast<T*>(smem.v_raw[stage]);
        empty = &smem.v_turned[stage];
      }
      if (FP8 || (ends_inside && (step + 1) * BLOCK_N > t.k_len)) full = &smem.v_loaded[stage];
      load_block<V_STORED_DIM / V_PANEL, V_PANEL, BLOCK_N, PACKS, EIGHTS>(args, args.v, target, *empty, *full,
                                                                          v_ring.parity(), t, step);
      v_ring.advance();
    };
    RingPosition<WIDENS ? Storage::Sizes::kStagesRaw : 1> raw_ring;
    const auto load_raw = [&](const CUtensorMap& map, const FlashTile& t, int32_t step) {
      if constexpr (WIDENS) {
        constexpr int WIDTH = kRawPanel<HEAD_DIM>;
        const uint32_t stage = raw_ring.stage();
        load_block<HEAD_DIM / WIDTH, WIDTH, BLOCK_N, PACKS, EIGHTS>(args, map, smem.raw[stage], smem.raw_empty[stage],
                                                                    smem.raw_full[stage], raw_ring.parity(), t, step);
        raw_ring.advance();
      }
    };
    FlashTileReader<Storage> tiles(smem);
    // With this block of keys a tile is near its end, and the next one is asked for: not before, since no CTA should
    // hold a tile that others have time for, and not after, since keys are fetched so many blocks ahead.
    const auto near_end = [](const FlashTile& t) { return min(t.end_step, t.begin_step + STAGES) - 1; };
    if (warp_idx == 0) {
      // ------------------------------------------------------------------------ tiles, and their Q
      RingPosition<Storage::kTileStages> tile_ring;
      PackedTiles packed_tiles;
      // Each CTA begins with the tile of its own number; but not where it may have to wait for an SM.
      const int32_t num_given = p.beside ? 0 : static_cast<int32_t>(gridDim.x);
      int32_t claimed = static_cast<int32_t>(blockIdx.x) - num_given;  // behind those that are given
      // Asks for the number of a tile, which takes its time.
      const auto claim = [&] {
        if (num_given >= args.num_tiles) {
          claimed = args.num_tiles;  // nobody counts: there is one for each
        } else if (lane == 0) {
          claimed = count_up(p.tile_counter);
        }
      };
      const auto publish = [&] {
        smem.tile_empty[tile_ring.stage()].wait(tile_ring.parity() ^ 1);
        __syncwarp();
        if (lane == 0) {
          smem.tile[tile_ring.stage()] = tile;
          smem.tile_full[tile_ring.stage()].arrive();
        }
        tile_ring.advance();
      };
      const auto load_q = [&] {
        const uint32_t stage = q_ring.stage();
        smem.q_empty[stage].wait(q_ring.parity() ^ 1);
        __syncwarp();
        MBarrier* full = &smem.q_full[stage];
        if constexpr (CONVERTS_Q) full = &smem.q_loaded[stage];
        if (lane == 0) {
          full->arrive_expect_bytes(PACKS ? args.tile_tokens * args.group_size.divisor * STORED_DIM *
                                                static_cast<uint32_t>(sizeof(T))
                                          : Q_BYTES);
        }
        if (lane < STORED_DIM / PANEL) {
          const int32_t token = tile.q_start + tile.first_row;
          tma_load_4d(smem.q[stage] + lane * BLOCK_M * PANEL, args.q, *full, lane * PANEL,
                      PACKS ? tile.head_idx : token, PACKS ? token : tile.head_idx, packed_q ? 0 : tile.seq_idx);
        }
        q_ring.advance();
      };

      if (p.beside) claim();
      while (true) {
        const int32_t tile_idx = __shfl_sync(0xffffffffu, claimed, 0) + num_given;
        if (!decode_tile<BLOCK_M, BLOCK_N, PACKS>(args, tile_idx, packed_tiles, tile)) break;
        publish();  // also a tile without keys, whose rows must be written
        if (tile.begin_step < tile.end_step) load_q();
        if constexpr (!HAS_HELPERS) {
          smem.tile_ends.wait((tile_ring.count - 1) % 2);
          // Nor before the last scores of the tile before are done, if this one is short.
          if (Storage::kStagesQ > 1) smem.q_empty[q_ring.stage()].wait(q_ring.parity() ^ 1);
          claim();
        } else {
          if (tile.begin_step == tile.end_step) claim();
          for (int32_t step = tile.end_step - 1; step >= tile.begin_step; --step) {
            if (step == near_end(tile)) claim();
            if constexpr (WIDENS) {
              load_raw(args.k, tile, step);
              load_raw(args.v, tile, step);
            } else {
              load_k(tile, step);
              load_v(tile, step);
            }
          }
        }
      }
      tile.end_step = -1;
      tile.whole_groups = 0;
      publish();
      if (p.beside) grid_dependency_wait();  // this kernel's end is the other one's too
    } else if (!HAS_HELPERS && warp_idx >= 2) {
      // ---------------------------------------------------------------------------------- K; V
      while (tiles.take(tile)) {
        // Of each tile once; K's warp tells it.
        const int32_t end = warp_idx == 2 && lane == 0 ? near_end(tile) : INT32_MIN;
        if (end == tile.begin_step - 1) smem.tile_ends.arrive();
        for (int32_t step = tile.end_step - 1; step >= tile.begin_step; --step) {
          warp_idx == 2 ? load_k(tile, step) : load_v(tile, step);
          if (step == end) smem.tile_ends.arrive();
        }
      }
    } else if constexpr (FP8) {
      // ------------------------------------------------------------------------------ turners
      while (tiles.take(tile)) {
        for (int32_t step = tile.end_step - 1; step >= tile.begin_step; --step) {
          smem.v_loaded[v_ring.stage()].wait(v_ring.parity());
          smem.v_empty[v_ring.stage()].wait(v_ring.parity() ^ 1);
          const int32_t num_keys = tile.k_len - step * BLOCK_N;
          const void* const values = smem.v_raw[v_ring.stage()];
          T* const turned = smem.v[v_ring.stage()];
          if (num_keys >= BLOCK_N) {
            turn_values<BLOCK_N, V_HEAD_DIM, V_PANEL, NUM_TURNERS, false>(values, turned, num_keys, warp_idx - 1, lane);
          } else {
            turn_values<BLOCK_N, V_HEAD_DIM, V_PANEL, NUM_TURNERS, true>(values, turned, num_keys, warp_idx - 1, lane);
          }
          fence_proxy_async();
          __syncwarp();
          if (lane == 0) {
            smem.v_full[v_ring.stage()].arrive();
            smem.v_turned[v_ring.stage()].arrive();
          }
          v_ring.advance();
        }
      }
    } else if constexpr (WIDENS) {
      // ------------------------------------------------------------------------------ wideners
      const uint32_t widener = warp_idx - 1;
      const float unit_of_k = never_plain ? 1.0f : p.softmax_scale * kLog2E * QUERY_UNIT;
      uint32_t num_blocks = 0;  // of the CTA, which go round so that each widener has as much to do
      const auto widen_block = [&](T* target, MBarrier& full, MBarrier& empty, uint32_t parity, int32_t num_keys,
                                   const auto& before_full) {
        const uint32_t stage = raw_ring.stage(), first = (widener + num_blocks++) % kWideners;
        const unsigned char* const raw = smem.raw[stage];
        smem.raw_full[stage].wait(raw_ring.parity());
        empty.wait(parity ^ 1);
        if (p.kv_dtype == DType::kInt8) {
          widen_rows<int8_t, BLOCK_N, HEAD_DIM>(raw, target, first, lane);
        } else {
          widen_rows<__nv_fp8_e4m3, BLOCK_N, HEAD_DIM>(raw, target, first, lane);
        }
        if (num_keys < BLOCK_N) {
          __syncwarp();
          clear_rows<BLOCK_N, HEAD_DIM>(target, num_keys, first, lane);
        }
        before_full();
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) smem.raw_empty[stage].arrive();
        full.arrive();  // each lane for itself, since factors are read as they were written: racecheck knows no other
                        // way
        raw_ring.advance();
      };
      while (tiles.take(tile)) {
        FlashLaneFactors factors = {};
        float reference = 0x1p-100f;
        const auto ask = [&](int32_t step) {
          if (has_factors && step >= tile.begin_step)
            factors = ask_for_factors<BLOCK_N>(args, tile, step, widener, lane);
        };
        ask(tile.end_step - 1);
        if constexpr (CONVERTS_Q) {
          if (tile.begin_step < tile.end_step) {
            const uint32_t stage = q_ring.stage();
            smem.q_loaded[stage].wait(q_ring.parity());
            queries_to_half<BLOCK_M * STORED_DIM>(smem.q[stage], widener, lane);
            fence_proxy_async();
            __syncwarp();
            if (lane == 0) smem.q_full[stage].arrive();
            q_ring.advance();
          }
        }
        for (int32_t step = tile.end_step - 1; step >= tile.begin_step; --step) {
          const int32_t num_keys = tile.k_len - step * BLOCK_N;
          const uint32_t stage = k_ring.stage();  // V's as well
          widen_block(smem.k[stage], smem.k_full[stage], smem.k_empty[stage], k_ring.parity(), BLOCK_N, [&] {
            if (has_factors) {
              store_factors(smem.factors, factors, unit_of_k, reference, stage, smem.factors.slot_of(k_ring.count),
                            kFactorsOfWideners, widener, lane);
            }
          });
          ask(step - 1);  // early: they come from device memory, behind an entry of the table
          widen_block(smem.v[stage], smem.v_full[stage], smem.v_empty[stage], k_ring.parity(), num_keys, [] {});
          k_ring.advance();
        }
      }
    } else if (warp_idx == 1 && ends_inside) {
      // ------------------------------------------------------------------------------ cleaner
      uint32_t parities = 0;  // one bit a stage
      while (tiles.take(tile)) {
        for (int32_t step = tile.end_step - 1; step >= tile.begin_step; --step) {
          if ((step + 1) * BLOCK_N > tile.k_len) {
            smem.v_loaded[v_ring.stage()].wait((parities >> v_ring.stage()) & 1);
            parities ^= 1u << v_ring.stage();
            // Whole rows of a panel, so that the swizzle, which permutes within a row, does not matter.
            const int32_t begin = (tile.k_len - step * BLOCK_N) * (V_PANEL / 8);
#pragma unroll 1
            for (int panel = 0; panel < V_STORED_DIM / V_PANEL; ++panel) {
              uint4* const chunks = reinterpret_cast<uint4*>(smem.v[v_ring.stage()] + panel * PANEL_ROWS * V_PANEL);
              for (int32_t i = begin + lane; i < BLOCK_N * (V_PANEL / 8); i += 32) {
                chunks[EIGHTS ? i + i / V_PANEL * (V_PANELS - 1) * V_PANEL : i] = make_uint4(0, 0, 0, 0);
              }
            }
            fence_proxy_async();
            __syncwarp();
            if (lane == 0) smem.v_full[v_ring.stage()].arrive();
          }
          v_ring.advance();
        }
      }
    }
    return;
  }

  // --------------------------------------------------------------------------------- consumers
  take_registers<CONSUMER_REGISTERS>();
  const int consumer = group_idx - 1;
  const int lane_row = consumer * 64 + warp_idx % 4 * 16 + lane / 4;  // a lane has this row of the tile, and 8 below
  float softmax_scale = p.softmax_scale;                              // with descales the tile's
  float scale_log2 = never_plain ? 1.0f : softmax_scale * kLog2E;
  FlashTileReader<Storage> tiles(smem);
  // Of the tile in hand, which else stays in shared memory, since registers are short.
  int32_t begin_step, end_step;    // what this group sees
  int32_t plain_begin, plain_end;  // of that, the blocks without a mask
  int32_t num_rows;                // from this lane's first one on

  float acc[V_HEAD_DIM / 8][4];                 // O
  float scores[BLOCK_N / 8][4];                 // S, then P
  uint32_t probs[BLOCK_N * sizeof(T) / 32][4];  // P rounded, as the left operand of the next product
  float row_max[2], row_sum[2] = {};            // the reference of the exponentials, and a lane's share of their sum
  float correction[2];                          // what a change of the reference makes of sums and O

  // ---- products
  const auto q_tiles = WgmmaDescriptor::make<PANEL * sizeof(T)>(smem.q[0] + consumer * 64 * PANEL, 0);
  const auto k_tiles = WgmmaDescriptor::make<PANEL * sizeof(T), EIGHTS ? PANELS : 1>(smem.k[0], 0);
  constexpr int KEY_PANEL = kKeyPanel<BLOCK_N>;
  const auto v_tiles = FP8 ? WgmmaDescriptor::make<KEY_PANEL>(smem.v[0], 0)
                           : WgmmaDescriptor::make<V_PANEL * sizeof(T), EIGHTS ? V_PANELS : 1>(
                                 smem.v[0], PANEL_ROWS * V_PANEL * sizeof(T));

  // The operands of the next products. Asked for before K is waited for, and kept for the case that S is computed
  // again, ptxas has all descriptors ready before the first product, and the others follow closely: 6 % where three
  // groups share the SM. Where groups take turns, the moves that this costs are in the way of the first one. fp8 asks
  // while the products of the step before run, so many blocks ahead.
  WgmmaDescriptor q, k, v;
  const auto locate = [&](uint32_t num_ahead = 0) {
    if (num_ahead == 0) q = q_tiles.uniform_plus(q_ring.stage() * Q_BYTES);
    k = k_tiles.uniform_plus((k_ring.count + num_ahead) % STAGES * K_BYTES);
    v = v_tiles.uniform_plus((v_ring.count + num_ahead) % STAGES * sizeof(smem.v[0]));
  };
  const auto start_scores = [&] {  // scores = Q K^T
    pin_registers(scores);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < HEAD_DIM / K; ++kk) {
      constexpr int STEPS = PANEL / K;
      Wgmma<T, BLOCK_N>::ss(scores, q.plus((kk / STEPS * BLOCK_M * PANEL + kk % STEPS * K) * sizeof(T)),
                            k.plus((kk / STEPS * PANEL_ROWS * PANEL + kk % STEPS * K) * sizeof(T)), kk > 0);
    }
    wgmma_commit();
  };
  const auto start_output = [&](bool first) {  // acc += P V
    pin_registers(acc);
    pin_registers(probs);
    wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < BLOCK_N / K; ++kk) {
      const int offset = FP8 ? kk * K / KEY_PANEL * V_HEAD_DIM * KEY_PANEL + kk * K % KEY_PANEL
                             : kk * K * V_PANEL * (EIGHTS ? V_PANELS : 1);
      Wgmma<T, V_HEAD_DIM>::rs(acc, probs[kk], v.plus(offset * sizeof(T)), kk > 0 || !first);
    }
    wgmma_commit();
  };
  const auto release = [&](MBarrier& barrier) {  // each warp for itself: its part of a product may end before others'
    if (lane == 0) barrier.arrive();
  };
  const auto release_k = [&] {
    release(smem.k_empty[k_ring.stage()]);
    k_ring.advance();
  };
  const auto release_v = [&] {
    release(smem.v_empty[v_ring.stage()]);
    v_ring.advance();
  };
  const auto wait_for_k = [&] { smem.k_full[k_ring.stage()].wait(k_ring.parity()); };
  const auto wait_for_v = [&] { smem.v_full[v_ring.stage()].wait(v_ring.parity()); };
  // The groups issue their products in turns, once for each block of K, so that one's run during the other's
  // exponentials. By chance they may be in step, and then both wait.
  const auto take_turn = [&] {
    if constexpr (TURNS) named_barrier_sync(kTurnOfGroup + consumer, 256);
  };
  const auto end_turn = [&] {
    if constexpr (TURNS) named_barrier_arrive(kTurnOfGroup + (consumer + 1) % NUM_CONSUMERS, 256);
  };
  const auto finish_output = [&] {
    wgmma_wait<0>();
    pin_registers(acc);
    pin_registers(probs);
    release_v();
  };

  // ---- softmax
  const auto mask_of = [&](const FlashTile& t) {
    return AttentionMask{t.q_len, t.k_len, p.window_left, p.window_right};
  };
  // The token of this lane's row r, and its head; and the token of a row of this group.
  const auto token_of_lane = [&](const FlashTile& t, int r) {
    return PACKS ? t.first_row + args.group_size.divide(lane_row + 8 * r) : t.first_row + lane_row + 8 * r;
  };
  const auto head_of_lane = [&](const FlashTile& t, int r) {
    return PACKS ? t.head_idx + args.group_size.remainder(lane_row + 8 * r) : t.head_idx;
  };
  const auto token_of_group = [&](const FlashTile& t, int row) {
    return PACKS ? t.first_row + args.group_size.divide(consumer * 64 + row) : t.first_row + consumer * 64 + row;
  };
  const auto is_masked = [&](int32_t step) { return step < plain_begin || step >= plain_end; };  // for some row
  // Softcap, ALiBi, mask and maximum of a block of scores.
  const auto find_max = [&](int32_t step) {
    const FlashTile& tile = tiles.now();
    if (has_softcap) {
      const float scale = softmax_scale / p.softcap, cap = p.softcap * kLog2E;
#pragma unroll
      for (int t = 0; t < BLOCK_N / 8; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[t][i] = cap * tanh_exp2(scores[t][i] * scale);
      }
    }
    if (has_alibi) {
      const float scale = has_softcap ? 1.0f : softmax_scale * kLog2E;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float slope = p.alibi_slopes[tile.seq_idx * p.alibi_batch_stride + head_of_lane(tile, r)] * kLog2E;
        const int32_t position = token_of_lane(tile, r) + tile.k_len - tile.q_len;
        const float distance = static_cast<float>(position - step * BLOCK_N - 2 * (lane % 4));
#pragma unroll
        for (int t = 0; t < BLOCK_N / 8; ++t) {
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) {
            scores[t][i] = scores[t][i] * scale - slope * fabsf(distance - static_cast<float>(t * 8 + i % 2));
          }
        }
      }
    }
    if (is_masked(step)) {
      const AttentionMask mask = mask_of(tile);
      const int32_t lane_key = step * BLOCK_N + 2 * (lane % 4);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const KeyRange visible = mask.visible(min(token_of_lane(tile, r), tile.q_len - 1));
        const int32_t begin = visible.begin - lane_key, end = visible.end - lane_key;
        if (step >= plain_end) {  // one comparison a score, not two: most blocks have one end
#pragma unroll
          for (int t = 0; t < BLOCK_N / 8; ++t) {
            if (t * 8 >= end) scores[t][2 * r] = -INFINITY;
            if (t * 8 + 1 >= end) scores[t][2 * r + 1] = -INFINITY;
          }
        }
        if (step < plain_begin) {
#pragma unroll
          for (int t = 0; t < BLOCK_N / 8; ++t) {
            if (t * 8 < begin) scores[t][2 * r] = -INFINITY;
            if (t * 8 + 1 < begin) scores[t][2 * r + 1] = -INFINITY;
          }
        }
      }
    }
    const auto max_of = [&](int r) {
      float maximum = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
      for (int t = 1; t < BLOCK_N / 8; ++t) maximum = fmaxf(maximum, fmaxf(scores[t][2 * r], scores[t][2 * r + 1]));
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
      return maximum;
    };
    float new_max[2];
    if constexpr (SHORT_MAX) {
      // As integers, three in one instruction: right unless all are negative, what was known included.
      int32_t signs = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int32_t maxima[2] = {__float_as_int(row_max[r]), __float_as_int(row_max[r])};
#pragma unroll
        for (int t = 0; t < BLOCK_N / 8; ++t) {
          maxima[t % 2] =
              __vimax3_s32(maxima[t % 2], __float_as_int(scores[t][2 * r]), __float_as_int(scores[t][2 * r + 1]));
        }
        int32_t maximum = max(maxima[0], maxima[1]);
        maximum = max(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
        maximum = max(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
        new_max[r] = __int_as_float(maximum);
        signs |= maximum;
      }
      if (__any_sync(0xffffffffu, signs < 0)) {
        new_max[0] = fmaxf(max_of(0), row_max[0]);
        new_max[1] = fmaxf(max_of(1), row_max[1]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (!SHORT_MAX) new_max[r] = fmaxf(max_of(r), row_max[r]);
      correction[r] = exp2_approx((row_max[r] - finite_max(new_max[r])) * scale_log2);
      row_max[r] = new_max[r];
    }
  };
  // Brings O, and its sums, to the new reference.
  const auto rescale = [&] {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (SHORT_MAX && !__any_sync(0xffffffffu, correction[r] != 1.0f)) continue;
      row_sum[r] *= correction[r];
#pragma unroll
      for (int t = 0; t < V_HEAD_DIM / 8; ++t) {
        acc[t][2 * r] *= correction[r];
        acc[t][2 * r + 1] *= correction[r];
      }
    }
  };
  // Pages of 8 bits with a factor for each token: what makes scores of products, of two columns.
  const auto factors_of_k = [&](int t) {
    float2 two = {};
    if constexpr (WIDENS) {
      two = load_shared_pair(shared_address(smem.factors.of_k[k_ring.stage()]) + lane % 4 * 8 + t * 32);
    }
    return two;
  };
  const auto scale_scores = [&] {
    if (!has_factors) return;
#pragma unroll
    for (int t = 0; t < BLOCK_N / 8; ++t) {
      const float2 two = factors_of_k(t);
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[t][i] *= i & 1 ? two.y : two.x;
    }
    __syncwarp();  // before one lane says that they have been read
  };
  // Scores to probabilities relative to row_max, of some tiles of eight keys; added to their sums.
  const auto exponentials_of = [&](int begin, int end, float (&parts)[4]) {
    const float origin[2] = {finite_max(row_max[0]) * scale_log2 - REFERENCE_LOG2,
                             finite_max(row_max[1]) * scale_log2 - REFERENCE_LOG2};
#pragma unroll
    for (int t = begin; t < end; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[t][i] = exp2_approx(fmaf(scores[t][i], scale_log2, -origin[i >> 1]));
        parts[i] += scores[t][i];
      }
    }
  };
  const auto exponentials = [&](float (&sums)[2], bool scaled) {  // scaled: scale_scores has been called
    float parts[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (has_factors && !scaled) {
#pragma unroll
      for (int t = 0; t < BLOCK_N / 8; ++t) {
        const float2 two = factors_of_k(t);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores[t][i] = exp2_approx(fmaf(scores[t][i], i & 1 ? two.y : two.x, -finite_max(row_max[i >> 1])));
          parts[i] += scores[t][i];
        }
      }
      __syncwarp();
    } else {
      exponentials_of(0, BLOCK_N / 8, parts);
    }
    sums[0] = parts[0] + parts[1];
    sums[1] = parts[2] + parts[3];
  };
  const auto round_probs = [&] {
    if constexpr (FP8) {
#pragma unroll
      for (int kk = 0; kk < BLOCK_N / 32; ++kk) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // rows, and rows + 8, of two tiles; then of two more
          const auto &low = scores[4 * kk + i / 2 * 2], &high = scores[4 * kk + i / 2 * 2 + 1];
          probs[kk][i] = pack_e4m3(low[i % 2 * 2], low[i % 2 * 2 + 1], high[i % 2 * 2], high[i % 2 * 2 + 1]);
        }
      }
    } else {
#pragma unroll
      for (int kk = 0; kk < BLOCK_N / 16; ++kk) {
        probs[kk][0] = pack_pair<T>(scores[2 * kk][0], scores[2 * kk][1]);
        probs[kk][1] = pack_pair<T>(scores[2 * kk][2], scores[2 * kk][3]);
        probs[kk][2] = pack_pair<T>(scores[2 * kk + 1][0], scores[2 * kk + 1][1]);
        probs[kk][3] = pack_pair<T>(scores[2 * kk + 1][2], scores[2 * kk + 1][3]);
      }
    }
  };

  // The same for P, rounded, of the block before the one that k_ring stands at. O must not be in flight.
  float reference_of_v = 1.0f;  // O is divided by it
  const auto scale_probs = [&](bool first) {
    if constexpr (WIDENS) {
      if (!has_factors) return;
      const uint32_t slot = smem.factors.slot_of(k_ring.count - 1);
      const float reference = smem.factors.reference[slot];
      if (!first && reference > reference_of_v) {
        const float ratio = reference_of_v / reference;
#pragma unroll
        for (int t = 0; t < V_HEAD_DIM / 8; ++t) {
#pragma unroll
          for (float& x : acc[t]) x *= ratio;
        }
      }
      reference_of_v = reference;
      const uint32_t address = shared_address(smem.factors.of_v[slot]) + lane % 4 * 4;
#pragma unroll
      for (int t = 0; t < BLOCK_N / 8; ++t) {
        const __half2 two = as_pair<__half>(load_shared(address + t * 16));
#pragma unroll
        for (int i = t % 2 * 2; i < t % 2 * 2 + 2; ++i) {
          probs[t / 2][i] = bits_of<__half>(__hmul2(as_pair<__half>(probs[t / 2][i]), two));
        }
      }
      __syncwarp();
    }
  };

  // ---- the ends of a tile
  const auto descale_of = [&](const FlashDescale& scale, const FlashTile& t) {
    if (scale.data == nullptr) return 1.0f;
    return scale.data[t.seq_idx * scale.seq_stride + args.group_size.divide(t.head_idx) * scale.head_stride];
  };
  // Where this lane's row r of a tile goes, and which part of it.
  const bool whole = args.num_splits.divisor == 1;
  const auto row_of = [&](const FlashTile& done, int r) {
    struct Row {
      bool counts, exists;
      float* lse;
      Out* out;        // whole
      float* partial;  // otherwise
    } result;
    const int32_t row = token_of_lane(done, r);
    const int64_t batch_idx = packed_q ? 0 : done.seq_idx;
    const int64_t token = done.q_start + row;
    const bool is_tiles = !PACKS || row - done.first_row < args.tile_tokens;
    result.counts = is_tiles && row < done.q_len;
    result.exists =
        EXTRAS && p.seqused_q != nullptr ? is_tiles && row < num_rows_of_sequence(p, done.seq_idx) : result.counts;
    result.lse = (whole ? p.lse : p.partial_lse + done.split_idx * p.num_heads * p.num_tokens) +
                 batch_idx * p.lse_batch_stride + head_of_lane(done, r) * p.lse_head_stride + token;
    result.out = static_cast<Out*>(p.out) + batch_idx * p.out_batch_stride + token * p.out_token_stride +
                 head_of_lane(done, r) * p.out_head_stride;
    result.partial = p.partial_out + ((done.split_idx * p.num_tokens + batch_idx * p.q_tokens + token) * p.num_heads +
                                      head_of_lane(done, r)) *
                                         p.v_head_dim;
    return result;
  };
  const auto bytes_of = [&](const FlashTile& done, int r) {  // the same place in e4m3, of pages
    return static_cast<uint8_t*>(p.out) + (done.q_start + token_of_lane(done, r)) * p.out_token_stride +
           head_of_lane(done, r) * p.out_head_stride;
  };
  const auto has_sink = [&](const FlashTile& t) {  // one part of the keys counts it
    return EXTRAS && p.sinks != nullptr && t.split_idx == 0;
  };
  // The end of a tile, where with few keys much of the time goes, in two parts: its LSE and what O is to be multiplied
  // by, which do not need the last output, and its rows, which do.
  float inverse[2] = {};
  const auto conclude = [&](const FlashTile& done) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 2);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum[r];
      const auto row = row_of(done, r);
      inverse[r] = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
      // The fma is explicit: this function is compiled in several places, and which of them writes a row depends on
      // which CTA had time for its tile; rounded once here and twice there, two runs would differ in the last bit.
      float log2_sum = sum == 0.0f ? -INFINITY : __fmaf_rn(row_max[r], scale_log2, __log2f(sum) - REFERENCE_LOG2);
      if (has_sink(done)) {
        const float sink = __fmul_rn(p.sinks[head_of_lane(done, r)], kLog2E);
        const float reference = fmaxf(log2_sum, sink);
        if (reference > -INFINITY) {
          const float with_sink = reference + log2f(exp2_approx(log2_sum - reference) + exp2_approx(sink - reference));
          inverse[r] *= exp2_approx(log2_sum - with_sink);
          log2_sum = with_sink;
        }
      }
      if constexpr (FP8 || WIDENS) inverse[r] *= descale_of(p.v_descale, done);
      if constexpr (WIDENS) inverse[r] *= reference_of_v;
      if (row.exists && lane % 4 == 0) *row.lse = row.counts ? log2_sum * kLn2 : -INFINITY;
    }
  };
  // Through shared memory, a warp for itself, so that a row leaves in whole lines and with few instructions.
  const auto write_staged_rows = [&](const FlashTile& done) {
    if constexpr (STAGES_ROWS) {
      constexpr int COLUMNS = Storage::kStagedColumns, PITCH = COLUMNS + 8;             // so that no bank is met twice
      constexpr int CHUNKS = COLUMNS / 8, ROWS = CHUNKS > 16 ? 1 : CHUNKS > 8 ? 2 : 4;  // that a warp writes at a time
      Out* const staged = reinterpret_cast<Out*>(smem.rows[warp_idx - 4]);
      const uint32_t target = shared_address(staged + lane % 16 * PITCH + lane / 16 * 8);
      const int row = lane / CHUNKS, column = lane % CHUNKS * 8;
      const int32_t first_row = token_of_group(done, warp_idx % 4 * 16) + row;
      const int32_t num_left = row < ROWS ? done.q_len - first_row : 0;
      Out* const out = static_cast<Out*>(p.out) + (packed_q ? 0 : done.seq_idx) * p.out_batch_stride +
                       (done.q_start + first_row) * p.out_token_stride + done.head_idx * p.out_head_stride + column;
#pragma unroll
      for (int first = 0; first < V_HEAD_DIM; first += COLUMNS) {
        __syncwarp();  // what was there has been read
#pragma unroll
        for (int t = 0; t < CHUNKS; t += 2) {
          const auto &left = acc[first / 8 + t], &right = acc[first / 8 + t + 1];
          const uint32_t words[4] = {pack_pair<Out>(left[0] * inverse[0], left[1] * inverse[0]),
                                     pack_pair<Out>(left[2] * inverse[1], left[3] * inverse[1]),
                                     pack_pair<Out>(right[0] * inverse[0], right[1] * inverse[0]),
                                     pack_pair<Out>(right[2] * inverse[1], right[3] * inverse[1])};
          store_matrices(target + t * 16, words);
        }
        __syncwarp();
        const int32_t num_rows_left = first + column < p.v_head_dim ? num_left : 0;
        Out* next = out + first;
#pragma unroll
        for (int i = 0; i < 16; i += ROWS) {
          const uint4 chunk = *reinterpret_cast<const uint4*>(staged + (row % ROWS + i) * PITCH + column);
          if (i < num_rows_left) *reinterpret_cast<uint4*>(next) = chunk;
          next += ROWS * p.out_token_stride;
        }
      }
    }
  };
  const auto write_rows = [&](const FlashTile& done) {
    if (STAGES_ROWS && whole) return write_staged_rows(done);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto row = row_of(done, r);
      if constexpr (FP8) {  // the columns' order: flash_fwd_sm90_fp8.cuh
        const int32_t first = lane % 4 * 4;
        const int32_t num_columns = (whole ? row.exists : row.counts) ? p.v_head_dim - first : 0;
#pragma unroll
        for (int t = 0; t < V_HEAD_DIM / 8; t += 2) {
          if (t * 8 >= num_columns) continue;
          const float x[4] = {acc[t][2 * r] * inverse[r], acc[t + 1][2 * r] * inverse[r],
                              acc[t][2 * r + 1] * inverse[r], acc[t + 1][2 * r + 1] * inverse[r]};
          if (whole) {
            *reinterpret_cast<uint2*>(row.out + first + t * 8) =
                row.counts ? make_uint2(pack_pair<Out>(x[0], x[1]), pack_pair<Out>(x[2], x[3])) : make_uint2(0, 0);
          } else {
            *reinterpret_cast<float4*>(row.partial + first + t * 8) = make_float4(x[0], x[1], x[2], x[3]);
          }
        }
      } else if (in_e4m3 && whole) {
        // Two bytes at a time: a form with gather_columns spills registers.
        uint8_t* const out = bytes_of(done, r) + lane % 4 * 2;
        const float to_e4m3 = __fdividef(inverse[r], *p.out_scale);
        const int32_t num_columns = row.counts ? p.v_head_dim : 0;  // without seqused_q those that exist
#pragma unroll
        for (int t = 0; t < V_HEAD_DIM / 8; ++t) {
          if (t * 8 < num_columns) {
            *reinterpret_cast<uint16_t*>(out + t * 8) =
                static_cast<uint16_t>(pack_e4m3(acc[t][2 * r] * to_e4m3, acc[t][2 * r + 1] * to_e4m3));
          }
        }
      } else if (!STAGES_ROWS && whole) {
        Out* const out = row.out + lane % 4 * 8;
        const int32_t num_columns = row.exists ? p.v_head_dim - lane % 4 * 8 : 0;
#pragma unroll
        for (int t = 0; t < V_HEAD_DIM / 8; t += 4) {
          uint32_t w[4] = {0, 0, 0, 0};
#pragma unroll
          for (int i = 0; i < 4 && t + i < V_HEAD_DIM / 8; ++i) {
            w[i] = pack_pair<Out>(acc[t + i][2 * r] * inverse[r], acc[t + i][2 * r + 1] * inverse[r]);
          }
          gather_columns(w, lane);
          if (t * 8 < num_columns) {
            *reinterpret_cast<uint4*>(out + t * 8) =
                !EXTRAS || row.counts ? make_uint4(w[0], w[1], w[2], w[3]) : make_uint4(0, 0, 0, 0);
          }
        }
      } else {
        float* const partial = row.partial + lane % 4 * 2;
        const int32_t num_columns = row.counts ? p.v_head_dim : 0;
#pragma unroll
        for (int t = 0; t < V_HEAD_DIM / 8; ++t) {
          if (t * 8 < num_columns) {
            *reinterpret_cast<float2*>(partial + t * 8) =
                make_float2(acc[t][2 * r] * inverse[r], acc[t][2 * r + 1] * inverse[r]);
          }
        }
      }
    }
  };
  // Rows that see no key.
  const auto store_empty = [&](const FlashTile& done) {
#pragma unroll 1
    for (int r = 0; r < 2; ++r) {
      const auto row = row_of(done, r);
      if (row.exists && lane % 4 == 0)
        *row.lse = row.counts && has_sink(done) ? p.sinks[head_of_lane(done, r)] : -INFINITY;
      const int32_t num_columns = whole ? (row.exists ? p.v_head_dim : 0) : (row.counts ? p.v_head_dim : 0);
#pragma unroll 1
      for (int32_t column = lane % 4 * 8; column < num_columns; column += 32) {
        if (whole && in_e4m3) {
          *reinterpret_cast<uint2*>(bytes_of(done, r) + column) = make_uint2(0, 0);
        } else if (whole) {
          *reinterpret_cast<uint4*>(row.out + column) = make_uint4(0, 0, 0, 0);
        } else if (has_sink(done)) {  // else the LSE is enough
          *reinterpret_cast<float4*>(row.partial + column) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          *reinterpret_cast<float4*>(row.partial + column + 4) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
      }
    }
  };
  const auto last_row = [&](const FlashTile& t) {  // its token
    return min(token_of_group(t, 63), t.q_len - 1);
  };
  // How many of a tile's last blocks no row of this group sees, as with a causal mask the upper groups.
  const auto num_unseen = [&](const FlashTile& t) {
    const int32_t my_end_step = (mask_of(t).visible(last_row(t)).end + BLOCK_N - 1) / BLOCK_N;
    return max(t.end_step - max(my_end_step, t.begin_step + 1), 0);
  };
  const auto begin_tile = [&] {
    const FlashTile& tile = tiles.now();
    const AttentionMask mask = mask_of(tile);
    begin_step = tile.begin_step;
    end_step = tile.end_step;
    plain_begin = (mask.visible(last_row(tile)).begin + BLOCK_N - 1) / BLOCK_N;
    plain_end = mask.visible(min(token_of_group(tile, 0), tile.q_len - 1)).end / BLOCK_N;
    num_rows = tile.q_len - tile.first_row;
    if (PACKS) num_rows = min(num_rows, args.tile_tokens) * args.group_size.divisor;
    num_rows -= lane_row;
    if constexpr (FP8 || WIDENS) {
      softmax_scale = p.softmax_scale * QUERY_UNIT * descale_of(p.q_descale, tile) * descale_of(p.k_descale, tile);
      softmax_scale = fmaxf(softmax_scale, FLT_MIN);  // a mask's -inf must not meet a zero
      if (!never_plain) scale_log2 = has_factors ? 1.0f : softmax_scale * kLog2E;
    }
  };
  const auto pass_over = [&](int32_t num_blocks) {
    for (int32_t i = 0; i < num_blocks; ++i) {  // waits, so as not to arrive twice in one phase
      wait_for_k();
      take_turn();
      end_turn();
      release_k();
      wait_for_v();
      release_v();
    }
  };
  // A tile's last group may have no rows, since the sequence ends before them: then its tile is another's work only.
  const auto has_rows = [&](const FlashTile& t) { return token_of_group(t, 0) < t.q_len; };
  // Takes the next tile in which a row of this group may see a key; rows of others are written here. False if there are
  // no more.
  const auto find_tile = [&] {
    while (true) {
      const FlashTile& tile = tiles.wait();
      if (tile.end_step < 0) return false;
      if (tile.begin_step < tile.end_step) {
        if (has_rows(tile)) return true;
        smem.q_full[q_ring.stage()].wait(q_ring.parity());
        release(smem.q_empty[q_ring.stage()]);
        q_ring.advance();
        pass_over(tile.end_step - tile.begin_step);
      }
      store_empty(tile);
      tiles.release();
    }
  };
  const auto pass_over_unseen = [&] {
    const int32_t num_blocks = num_unseen(tiles.now());
    pass_over(num_blocks);
    end_step -= num_blocks;
  };
  const auto release_scores = [&](int32_t step) {
    release_k();
    if (step == begin_step) {
      release(smem.q_empty[q_ring.stage()]);
      q_ring.advance();
    }
  };
  const auto start_first_scores = [&] {
    if (!TURNS) locate();
    smem.q_full[q_ring.stage()].wait(q_ring.parity());
    wait_for_k();
    take_turn();
    if (TURNS) locate();
    start_scores();
    end_turn();
  };
  // P of a tile's first block, whose scores have been started.
  const auto finish_first_scores = [&] {
    wgmma_wait<0>();
    pin_registers(scores);
    scale_scores();
    release_scores(end_step - 1);
    row_max[0] = row_max[1] = -INFINITY;
    find_max(end_step - 1);
    exponentials(row_sum, true);
    round_probs();
    scale_probs(true);
  };

  // ---- main loop
  if (TURNS && consumer == NUM_CONSUMERS - 1) end_turn();  // the first group begins
  if (!find_tile()) return;
  begin_tile();
  pass_over_unseen();
  start_first_scores();
  finish_first_scores();

  while (true) {
    // Here P of the tile's first block is ready, and nothing is in flight.
    bool first = true;
    if (LOCATES_AHEAD) locate();
#pragma unroll 1
    for (int32_t step = end_step - 2; step >= begin_step; --step) {
      if (!TURNS && !LOCATES_AHEAD) locate();
      wait_for_k();
      take_turn();
      if (TURNS) locate();
      start_scores();
      wait_for_v();
      start_output(first);
      if (LOCATES_AHEAD) locate(1);
      end_turn();
      first = false;
      wgmma_wait<1>();
      pin_registers(scores);
      if constexpr (FP8) {
        // P has 4 bits: its largest value, which may be all there is, must be a power of two, so that each step has a
        // maximum. The exponentials come in two parts: the first hide the output's products, the second the rounding.
        constexpr int NUM_TILES = BLOCK_N / 8, EARLY_TILES = NUM_TILES / 2 / 4 * 4;
        release_scores(step);
        find_max(step);
        float parts[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        exponentials_of(0, EARLY_TILES, parts);
        // A wait for products must be met by all warps of a group or none, so that the group votes on it; what is then
        // to be rescaled is each warp's own.
        const bool moved = __any_sync(0xffffffffu, (correction[0] != 1.0f) | (correction[1] != 1.0f));
        if (any_of_group(kVoteOfGroup + consumer, moved | (parts[0] + parts[1] + parts[2] + parts[3] < 0.0f))) {
          wgmma_wait<0>();
          pin_registers(acc);
          if (moved) rescale();
        }
        finish_output();
        exponentials_of(EARLY_TILES, NUM_TILES, parts);
        row_sum[0] += parts[0] + parts[1];
        row_sum[1] += parts[2] + parts[3];
        round_probs();
      } else {
        float sums[2] = {0.0f, 0.0f};
        bool exact = never_plain || is_masked(step);
        if (!exact) {
          exponentials(sums, false);
          // This branch also keeps the exponentials before the wait for the output, behind which the assembler would
          // move them: the output would then run alone. Rows behind the end, which may be another sequence's, have no
          // say.
          // No && nor ||: the compiler would make branches of them, and move half of the sums behind the first.
          exact = any_of_group(kVoteOfGroup + consumer,
                               ((num_rows > 0) & (!(sums[0] < LARGEST_SUM) | (row_max[0] == -INFINITY))) |
                                   ((num_rows > 8) & (!(sums[1] < LARGEST_SUM) | (row_max[1] == -INFINITY))));
          if (__builtin_expect(exact, 0)) {
            wgmma_wait<0>();
            pin_registers(acc);
            if (TURNS) locate();
            start_scores();
            wgmma_wait<0>();
            pin_registers(scores);
          }
        }
        if (__builtin_expect(exact, 0)) {
          scale_scores();
          find_max(step);
          exponentials(sums, true);
          wgmma_wait<0>();
          pin_registers(acc);
          rescale();
        }
        row_sum[0] += sums[0];
        row_sum[1] += sums[1];
        release_scores(step);
        finish_output();
        round_probs();
        scale_probs(false);
      }
    }

    const FlashTile& next = tiles.wait_for_next();
    const bool goes_on = next.whole_groups >> consumer & 1;
    locate();
    wait_for_v();
    if (goes_on) {
      start_output(first);
      start_first_scores();
      if (STAGES_ROWS) conclude(tiles.now());  // the others have no registers for it here
      wgmma_wait<1>();
      pin_registers(acc);
      pin_registers(probs);
      release_v();
      if (!STAGES_ROWS) conclude(tiles.now());
      write_rows(tiles.now());
      tiles.release();
      begin_tile();
    } else {
      start_output(first);
      finish_output();
      conclude(tiles.now());
      write_rows(tiles.now());
      tiles.release();
      if (!find_tile()) return;
      begin_tile();
      pass_over_unseen();
      start_first_scores();
    }
    finish_first_scores();
  }
#else
  __trap();  // compiled for a target without wgmma: never launched, and never silent
#endif
}

}  // namespace fastattn
