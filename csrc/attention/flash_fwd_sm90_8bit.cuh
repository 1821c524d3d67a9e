// What pages of 8 bits add to the Hopper attention kernel: their keys and values widened in shared memory.
//
// wgmma takes both operands of one type, and to round Q and P to 8 bits would cost what the pages have not lost. So the
// copy engine brings a block of K or V as it is in the cache, and three warps make fp16 of it where wgmma reads it.
// Every number of 8 bits is one of fp16, and the way there is a third of that to bf16: so queries in bf16 become fp16
// too, a sixteenth of what they were; from 2^20 on they are infinite, and below 2^-10 they are rounded to 2^-20.
//
//   warp 0           Q, then raw: K(n) V(n) K(n-1) V(n-1) …
//   warps 1 to 3     Q to fp16; widen K(n), V(n), …: of each its share of the rows, eight at a time
//
// One factor for all tokens of a KV head is left to the scores and to the output. One for each token multiplies S, or P
// before it is rounded: those of V over a power of two that is at least their maximum so far (FlashTokenFactors).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "arch/fragments.cuh"
#include "arch/panel_swizzle.cuh"
#include "arch/widen.cuh"
#include "attention/flash_fwd_sm90_tiles.cuh"

namespace fastattn {

// A row of raw numbers lies in panels of so many bytes.
template <int HEAD_DIM>
constexpr int kRawPanel = HEAD_DIM < 128 ? HEAD_DIM : 128;

constexpr uint32_t kWideners = 3;             // warps
constexpr float kWidenedQueryScale = 0.0625f;  // of queries in bf16

// ---------------------------------------------------------------------------------------------
// The factors of a block's tokens, in shared memory. Those of K are used up with S. Those of V wait for P, while K of
// later blocks may come already: so they have a slot more than K has stages.
template <int STAGES, int BLOCK_N>
struct FlashTokenFactors {
  static constexpr int kSlots = STAGES + 1;
  float of_k[STAGES][BLOCK_N];
  float of_v[kSlots][BLOCK_N];
  float largest_of_v[kSlots][kWideners];  // of what each warp has stored
};

// A lane's share of them: those of two tokens, far enough ahead that they are there when they are wanted.
struct FlashLaneFactors {
  float of_k[2], of_v[2];
};

__device__ __forceinline__ uint32_t token_of_lane(int i, uint32_t warp, uint32_t lane) {
  return (i * kWideners + warp) * 32 + lane;
}

template <int BLOCK_N>
__device__ __forceinline__ FlashLaneFactors ask_for_factors(const FlashFwdSm90Args& args, const FlashTile& tile,
                                                            int32_t step, uint32_t warp, uint32_t lane) {
  static_assert(BLOCK_N <= 2 * 32 * kWideners);
  const FlashFwdSm90Params& p = args.p;
  const int32_t kv_head = args.group_size.divide(tile.head_idx);
  FlashLaneFactors factors = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t token = token_of_lane(i, warp, lane);
    const int32_t key = step * BLOCK_N + static_cast<int32_t>(token);
    if (token >= BLOCK_N || key >= tile.k_len) continue;  // P of others is zero, and must stay it
    const int32_t idx = args.page_size.divide(key);
    const int64_t page = p.block_table[tile.seq_idx * p.block_table_stride + idx];
    if (page < 0 || page >= p.num_pages) continue;  // the copy engine brings zeros
    const int64_t of_page = key - idx * args.page_size.divisor;
    const auto load = [&](const KvScale& s) {
      return s.data[page * s.block_stride + of_page * s.token_stride + kv_head * s.head_stride];
    };
    factors.of_k[i] = load(p.k_scale);
    factors.of_v[i] = load(p.v_scale);
  }
  return factors;
}

template <int STAGES, int BLOCK_N>
__device__ __forceinline__ void store_factors(FlashTokenFactors<STAGES, BLOCK_N>& target, const FlashLaneFactors& own,
                                              uint32_t stage, uint32_t slot, uint32_t warp, uint32_t lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t token = token_of_lane(i, warp, lane);
    if (token < BLOCK_N) {
      target.of_k[stage][token] = own.of_k[i];
      target.of_v[slot][token] = own.of_v[i];
    }
  }
  // Positive numbers are in the order of their bits.
  const float largest = fmaxf(fmaxf(own.of_v[0], own.of_v[1]), 0.0f);
  const uint32_t bits = __reduce_max_sync(0xffffffffu, __float_as_uint(largest));
  if (lane == 0) target.largest_of_v[slot][warp] = __uint_as_float(bits);
}

// A power of two that is at least as large as V's factors in that slot.
template <int STAGES, int BLOCK_N>
__device__ __forceinline__ float factor_reference(const FlashTokenFactors<STAGES, BLOCK_N>& factors, uint32_t slot) {
  const float(&largest)[kWideners] = factors.largest_of_v[slot];
  const uint32_t bits = __float_as_uint(fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], 0x1p-100f)));
  return __uint_as_float((bits + 0x007fffffu) & 0xff800000u);
}

// ---------------------------------------------------------------------------------------------
// One of the warps widens its share of a block from `raw` to `target`, (BLOCK_N, HEAD_DIM) in panels of 128 bytes:
// groups of eight rows, from the `first` one on every kWideners-th.
//
// A lane has 16 numbers of a row, which become two chunks of 16 bytes; some lanes take the second one first, so that
// half a warp that reads 8 bytes a lane, and a quarter that writes 16, meet each bank once.
template <typename KV, int BLOCK_N, int HEAD_DIM>
__device__ __forceinline__ void widen_rows(const unsigned char* __restrict__ raw, __half* __restrict__ target,
                                           uint32_t first, uint32_t lane) {
  constexpr uint32_t CHUNKS = HEAD_DIM / 16, ROWS = 32 / CHUNKS, PASSES = 8 / ROWS;  // of a row; that a warp reads at once
  constexpr uint32_t RAW_PANEL = kRawPanel<HEAD_DIM>, PANEL = 128;
  constexpr uint32_t NUM_GROUPS = BLOCK_N / 8, MOST = (NUM_GROUPS + kWideners - 1) / kWideners;
  static_assert(HEAD_DIM % 64 == 0 && 8 % ROWS == 0 && BLOCK_N % 8 == 0);
  const uint32_t chunk = lane % CHUNKS, row = lane / CHUNKS;
  const uint32_t turned = (HEAD_DIM == 64 ? row / 2 : HEAD_DIM == 128 ? chunk / 4 ^ row : chunk / 4 ^ chunk / 8) & 1;
  const uint32_t source = chunk * 16 / RAW_PANEL * BLOCK_N * RAW_PANEL +
                          swizzled<RAW_PANEL>(row * RAW_PANEL + chunk * 16 % RAW_PANEL) + turned * 8;
  const uint32_t place =
      chunk / 4 * BLOCK_N * PANEL + swizzled<PANEL>(row * PANEL + chunk % 4 * 32 + turned * 16) + first * 8 * PANEL;
  const unsigned char* const lane_raw = raw + first * 8 * RAW_PANEL;
  unsigned char* const lane_target = reinterpret_cast<unsigned char*>(target);

  uint2 ahead[PASSES][2];  // of the next group
  const auto load = [&](uint32_t i) {
#pragma unroll
    for (uint32_t pass = 0; pass < PASSES; ++pass) {
      // The rows of a pass have bits in their number that the lane's own row has not: so much more is swizzled.
      const uint32_t rows = pass * ROWS * RAW_PANEL, flip = swizzled<RAW_PANEL>(rows) ^ rows;
      const unsigned char* const from = lane_raw + i * kWideners * 8 * RAW_PANEL + rows;
      ahead[pass][0] = *reinterpret_cast<const uint2*>(from + (source ^ flip));
      ahead[pass][1] = *reinterpret_cast<const uint2*>(from + (source ^ flip ^ 8));
    }
  };
  load(0);
#pragma unroll
  for (uint32_t i = 0; i < MOST; ++i) {
    if ((i + 1) * kWideners > NUM_GROUPS && first + i * kWideners >= NUM_GROUPS) break;
    uint2 now[PASSES][2];
#pragma unroll
    for (uint32_t pass = 0; pass < PASSES; ++pass) {
      now[pass][0] = ahead[pass][0];
      now[pass][1] = ahead[pass][1];
    }
    if (i + 1 < MOST && ((i + 2) * kWideners <= NUM_GROUPS || first + (i + 1) * kWideners < NUM_GROUPS)) load(i + 1);
#pragma unroll
    for (uint32_t pass = 0; pass < PASSES; ++pass) {
      const uint32_t rows = pass * ROWS * PANEL, flip = swizzled<PANEL>(rows) ^ rows;
      unsigned char* const to = lane_target + i * kWideners * 8 * PANEL + rows;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t wide[2][2];
        widen<KV>(wide[0], now[pass][half].x);
        widen<KV>(wide[1], now[pass][half].y);
        *reinterpret_cast<uint4*>(to + (place ^ flip ^ half * 16)) =
            make_uint4(wide[0][0], wide[0][1], wide[1][0], wide[1][1]);
      }
    }
  }
}

// Zeros in those of the warp's rows that have no key: P is zero there, but 0 * NaN is not.
template <int BLOCK_N, int HEAD_DIM>
__device__ __forceinline__ void clear_rows(__half* target, int32_t num_keys, uint32_t first, uint32_t lane) {
  for (uint32_t group = first; group < BLOCK_N / 8; group += kWideners) {
    for (uint32_t i = lane; i < HEAD_DIM / 64 * 64; i += 32) {  // chunks of 16 bytes: eight in a row of a panel
      const uint32_t row = group * 8 + i % 64 / 8;
      if (static_cast<int32_t>(row) < num_keys) continue;
      reinterpret_cast<uint4*>(target)[(i / 64 * BLOCK_N + row) * 8 + i % 8] = make_uint4(0, 0, 0, 0);
    }
  }
}

// One of the warps turns its share of so many queries from bf16 to fp16, in place.
template <int NUM>
__device__ __forceinline__ void queries_to_half(__half* queries, uint32_t warp, uint32_t lane) {
  uint4* const chunks = reinterpret_cast<uint4*>(queries);
#pragma unroll 4
  for (uint32_t i = warp * 32 + lane; i < NUM / 8; i += kWideners * 32) {
    uint4 chunk = chunks[i];
    uint32_t* const pairs[4] = {&chunk.x, &chunk.y, &chunk.z, &chunk.w};
#pragma unroll
    for (uint32_t* pair : pairs) {
      const float2 two = unpack_pair<__nv_bfloat16>(*pair);
      *pair = pack_pair<__half>(two.x * kWidenedQueryScale, two.y * kWidenedQueryScale);
    }
    chunks[i] = chunk;
  }
}

}  // namespace fastattn
