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
// One factor for all tokens of a KV head is left to the scores and to the output. Of those of each token K's multiply
// the scores where these are scaled anyway, and V's P once it is rounded, as fp16 (FlashTokenFactors).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "arch/fragments.cuh"
#include "arch/mbarrier.cuh"
#include "arch/panel_swizzle.cuh"
#include "arch/widen.cuh"
#include "attention/flash_fwd_sm90_tiles.cuh"

namespace fastattn {

// A row of raw numbers lies in panels of so many bytes.
template <int HEAD_DIM>
constexpr int kRawPanel = HEAD_DIM < 128 ? HEAD_DIM : 128;

constexpr uint32_t kWideners = 3;              // warps
constexpr float kWidenedQueryScale = 0.0625f;  // of queries in bf16

// ---------------------------------------------------------------------------------------------
// The factors of a block's tokens, in shared memory. Those of K are used up with S. Those of V wait for P, while K of
// later blocks may come already: so they have a slot more than K has stages.
template <int STAGES, int BLOCK_N>
struct FlashTokenFactors {
  static constexpr int kSlots = STAGES + 1;
  float of_k[STAGES][BLOCK_N];       // that bring a product to a score
  uint16_t of_v[kSlots][BLOCK_N];    // fp16, divided by
  float reference[kSlots];           // a power of two, at least the largest factor of this block and those before
  float largest[kSlots][kWideners];  // of what each warp has

  __device__ __forceinline__ static uint32_t slot_of(uint32_t block) { return block % kSlots; }
};

// A lane's share of them, of one token or two: asked for far enough ahead that they are there when they are wanted.
struct FlashLaneFactors {
  float of_k[2], of_v[2];
};

__device__ __forceinline__ uint32_t token_of_lane(uint32_t i, uint32_t warp, uint32_t lane) {
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
  for (uint32_t i = 0; i < 2; ++i) {
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

// By all wideners: what they have of a block to its slot, and V's reference raised to be no less than any of it.
template <int STAGES, int BLOCK_N>
__device__ __forceinline__ void store_factors(FlashTokenFactors<STAGES, BLOCK_N>& target,
                                              const FlashLaneFactors& factors, float unit_of_k, float& reference,
                                              uint32_t stage, uint32_t slot, int barrier, uint32_t warp,
                                              uint32_t lane) {
  // Positive numbers are in the order of their bits.
  const float most = fmaxf(fmaxf(factors.of_v[0], factors.of_v[1]), 0.0f);
  const float of_warp = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(most)));
  float (&largest)[kWideners] = target.largest[slot];
  if (lane == 0) largest[warp] = of_warp;
  named_barrier_sync(barrier, 32 * kWideners);
  reference = fmaxf(fmaxf(reference, largest[0]), fmaxf(largest[1], largest[2]));
  reference = __uint_as_float((__float_as_uint(reference) + 0x007fffffu) & 0xff800000u);
  const float inverse = 1.0f / reference;
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) {
    const uint32_t token = token_of_lane(i, warp, lane);
    if (token >= BLOCK_N) continue;
    target.of_k[stage][token] = factors.of_k[i] * unit_of_k;
    target.of_v[slot][token] = static_cast<uint16_t>(pack_pair<__half>(factors.of_v[i] * inverse, 0.0f));
  }
  if (warp == 0 && lane == 0) target.reference[slot] = reference;
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
  constexpr uint32_t CHUNKS = HEAD_DIM / 16;                 // of a row
  constexpr uint32_t ROWS = 32 / CHUNKS, PASSES = 8 / ROWS;  // that a warp reads at once; of a group
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

  // Read one ahead of what is written: the passes of a group, or two of them at a time.
  constexpr uint32_t AT_ONCE = PASSES < 2 ? PASSES : 2, TURNS = PASSES / AT_ONCE;
  uint2 ahead[AT_ONCE][2];
  const auto load = [&](uint32_t i) {
#pragma unroll
    for (uint32_t at = 0; at < AT_ONCE; ++at) {
      // The rows of a pass have bits in their number that the lane's own row has not: so much more is swizzled.
      const uint32_t rows = (i % TURNS * AT_ONCE + at) * ROWS * RAW_PANEL, flip = swizzled<RAW_PANEL>(rows) ^ rows;
      const unsigned char* const from = lane_raw + i / TURNS * kWideners * 8 * RAW_PANEL + rows;
      ahead[at][0] = *reinterpret_cast<const uint2*>(from + (source ^ flip));
      ahead[at][1] = *reinterpret_cast<const uint2*>(from + (source ^ flip ^ 8));
    }
  };
  const auto exists = [&](uint32_t i) {  // the warps' last groups may not
    return (i / TURNS + 1) * kWideners <= NUM_GROUPS || first + i / TURNS * kWideners < NUM_GROUPS;
  };
  load(0);
#pragma unroll
  for (uint32_t i = 0; i < MOST * TURNS; ++i) {
    if (!exists(i)) break;
    uint2 now[AT_ONCE][2];
#pragma unroll
    for (uint32_t at = 0; at < AT_ONCE; ++at) {
      now[at][0] = ahead[at][0];
      now[at][1] = ahead[at][1];
    }
    if (i + 1 < MOST * TURNS && exists(i + 1)) load(i + 1);
#pragma unroll
    for (uint32_t at = 0; at < AT_ONCE; ++at) {
      const uint32_t rows = (i % TURNS * AT_ONCE + at) * ROWS * PANEL, flip = swizzled<PANEL>(rows) ^ rows;
      unsigned char* const to = lane_target + i / TURNS * kWideners * 8 * PANEL + rows;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t wide[2][2];
        widen<KV>(wide[0], now[at][half].x);
        widen<KV>(wide[1], now[at][half].y);
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
