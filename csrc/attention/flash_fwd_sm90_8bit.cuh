// What pages of 8 bits add to the Hopper attention kernel: their keys and values widened in shared memory.
//
// wgmma takes both operands of one type, and to round Q and P to 8 bits would cost what the pages have not lost. So the
// copy engine brings a block of K or V as it is in the cache, and three warps make 16 bits of it where wgmma reads it:
// one factor for all tokens of a KV head is left to the scores and to the output, one for each token is multiplied in,
// and the product rounded once. Keys behind the end of the sequence become zeros.
//
//   warp 0           raw: K(n) V(n) K(n-1) V(n-1) …
//   warps 1 to 3     widen K(n), V(n), …: of each its share of the rows, eight at a time
//
// A lane has 16 numbers of a row, which become two chunks of 16 bytes. Lanes of odd half panels write the second one
// first: eight lanes at a time, all of which must meet different banks, would meet each two times.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "arch/fragments.cuh"
#include "arch/panel_swizzle.cuh"
#include "arch/widen.cuh"
#include "attention/flash_fwd_sm90_tiles.cuh"

namespace fastattn {

// A row of raw numbers lies in panels of so many bytes.
template <int HEAD_DIM>
constexpr int kRawPanel = HEAD_DIM < 128 ? HEAD_DIM : 128;

constexpr uint32_t kWideners = 3;  // warps

// Of the rows of a block that are a warp's: row 8 g + r of it, in its g-th group of eight, is lane 8 (g % 4) + r's
// number g / 4.
struct FlashRowScales {
  float of_k[2], of_v[2];
};

// Asks for the factors of a block's tokens, by one of the warps.
template <int BLOCK_N>
__device__ __forceinline__ FlashRowScales row_scales(const FlashFwdSm90Args& args, const FlashTile& tile, int32_t step,
                                                     uint32_t warp, uint32_t lane) {
  const FlashFwdSm90Params& p = args.p;
  const int32_t kv_head = args.group_size.divide(tile.head_idx);
  FlashRowScales scales = {};
#pragma unroll
  for (uint32_t i = 0; i < 2; ++i) {
    const uint32_t row = (warp + (4 * i + lane / 8) * kWideners) * 8 + lane % 8;
    const int32_t key = step * BLOCK_N + static_cast<int32_t>(row);
    if (row >= BLOCK_N || key >= tile.k_len) continue;
    const int32_t idx = args.page_size.divide(key);
    const int64_t page = p.block_table[tile.seq_idx * p.block_table_stride + idx];
    if (page < 0 || page >= p.num_pages) continue;  // the copy engine brings zeros
    const int64_t token = key - idx * args.page_size.divisor;
    const auto load = [&](const KvScale& s) {
      return s.data[page * s.block_stride + token * s.token_stride + kv_head * s.head_stride];
    };
    scales.of_k[i] = load(p.k_scale);
    scales.of_v[i] = load(p.v_scale);
  }
  return scales;
}

// One of the warps widens its share of a block from `raw` to `target`, (BLOCK_N, HEAD_DIM) in panels of 128 bytes.
// SCALED: each row times its factor. Rows from num_keys on become zeros.
template <typename T, typename KV, int BLOCK_N, int HEAD_DIM, bool SCALED>
__device__ __forceinline__ void widen_rows(const unsigned char* raw, T* target, const float (&scales)[2],
                                           int32_t num_keys, uint32_t warp, uint32_t lane) {
  constexpr uint32_t CHUNKS = HEAD_DIM / 16, ROWS = 32 / CHUNKS;  // of a row; that a warp reads at a time
  constexpr uint32_t RAW_PANEL = kRawPanel<HEAD_DIM>, PANEL = 128;
  static_assert(HEAD_DIM % 64 == 0 && 8 % ROWS == 0 && BLOCK_N % 8 == 0 && BLOCK_N <= 8 * 8 * kWideners);
  const uint32_t chunk = lane % CHUNKS, row = lane / CHUNKS;
  const bool second_first = chunk / 4 % 2 != 0;
  const uint32_t source =
      chunk * 16 / RAW_PANEL * BLOCK_N * RAW_PANEL + swizzled<RAW_PANEL>(row * RAW_PANEL + chunk * 16 % RAW_PANEL);
  const uint32_t first =
      chunk / 4 * BLOCK_N * PANEL + swizzled<PANEL>(row * PANEL + chunk % 4 * 32 + (second_first ? 16 : 0));
#pragma unroll 1
  for (uint32_t group = warp, i = 0; group < BLOCK_N / 8; group += kWideners, ++i) {
    const unsigned char* const group_raw = raw + group * 8 * RAW_PANEL;
    unsigned char* const group_target = reinterpret_cast<unsigned char*>(target) + group * 8 * PANEL;
    const float group_scales = i < 4 ? scales[0] : scales[1];
#pragma unroll
    for (uint32_t pass = 0; pass < 8 / ROWS; ++pass) {
      // The rows of a pass have bits in their number that the lane's own row has not: so much more is swizzled.
      const uint32_t raw_rows = pass * ROWS * RAW_PANEL, raw_flip = swizzled<RAW_PANEL>(raw_rows) ^ raw_rows;
      const uint32_t rows = pass * ROWS * PANEL, flip = swizzled<PANEL>(rows) ^ rows;
      uint4 from = *reinterpret_cast<const uint4*>(group_raw + (source ^ raw_flip) + raw_rows);
      if (static_cast<int32_t>(group * 8 + pass * ROWS + row) >= num_keys) from = make_uint4(0, 0, 0, 0);
      const uint32_t fours[4] = {second_first ? from.z : from.x, second_first ? from.w : from.y,
                                 second_first ? from.x : from.z, second_first ? from.y : from.w};
      const float scale = SCALED ? __shfl_sync(0xffffffffu, group_scales, i % 4 * 8 + pass * ROWS + row) : 1.0f;
      uint32_t wide[4][2];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        widen<KV>(wide[w], fours[w]);
        if constexpr (SCALED || !std::is_same_v<T, __half>) {
#pragma unroll
          for (uint32_t& two : wide[w]) {
            const float2 pair = unpack_pair<__half>(two);
            two = SCALED ? pack_pair<T>(pair.x * scale, pair.y * scale) : pack_pair<T>(pair.x, pair.y);
          }
        }
      }
      unsigned char* const to = group_target + rows;
      *reinterpret_cast<uint4*>(to + (first ^ flip)) = make_uint4(wide[0][0], wide[0][1], wide[1][0], wide[1][1]);
      *reinterpret_cast<uint4*>(to + (first ^ flip ^ 16)) = make_uint4(wide[2][0], wide[2][1], wide[3][0], wide[3][1]);
    }
  }
}

}  // namespace fastattn
