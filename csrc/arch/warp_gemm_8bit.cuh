// A warp's products of 16 rows with K and V of 8 bits in shared memory, 32 keys a tile, in fp16 (arch/widen.cuh).
//
// A tile is stored as (key, dim) with dim contiguous and swizzled as if two dims were one 16-bit value. So ldmatrix
// gives a lane = 4 * g + t, of 16 dims (a chunk) of each eight keys, four bytes, and in what order they come to a sum
// is free:
//
//   scores   key g, dims 4t … 4t+3              b0 = dims 4t, 4t+1, b1 = 4t+2, 4t+3: Q's fragments are of the same
//   out      keys 2t, 2t+1, dims 2g, 2g+1       one product for the even dims, one for the odd ones: a lane's results
//   in
//            (the transposing load)             both are of dims 4t … 4t+3
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "arch/mma_sm80.cuh"
#include "arch/swizzle.cuh"
#include "arch/warp_gemm_sm80.cuh"
#include "arch/widen.cuh"

namespace fastattn {

// The 32 keys' rows of a tile, for the lane whose address is that of its own key's.
template <int HEAD_DIM>
struct KeyRows {
  LaneAddress<HEAD_DIM / 2> lane;

  __device__ __forceinline__ explicit KeyRows(const uint16_t* tile) : lane(tile, threadIdx.x % 32, 0) {}

  // Four bytes of each eight keys.
  __device__ __forceinline__ void load(uint32_t (&fours)[4], int chunk) const { ldmatrix_x4(fours, lane.at(0, chunk)); }
  __device__ __forceinline__ void load_transposed(uint32_t (&fours)[4], int chunk) const {
    ldmatrix_x4_trans(fours, lane.at(0, chunk));
  }
};

// Loads ahead of the products that need them; with these nothing spills.
template <int HEAD_DIM>
inline constexpr int k8BitAhead = HEAD_DIM <= 128 ? 2 : 1;

// scores (16 x 32) = q k^T. q_frag[chunk]: (g, 4t..4t+1), (g + 8, the same), (g, 4t+2..4t+3), (g + 8, the same).
template <typename KV, int HEAD_DIM>
__device__ __forceinline__ void warp_scores_8bit(float (&scores)[4][4], const uint32_t (&q_frag)[HEAD_DIM / 16][4],
                                                 const KeyRows<HEAD_DIM>& keys) {
  constexpr int CHUNKS = HEAD_DIM / 16, AHEAD = k8BitAhead<HEAD_DIM>, SLOTS = AHEAD + 1;
  uint32_t fours[SLOTS][4];
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) keys.load(fours[i], i);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    if (chunk + AHEAD < CHUNKS) keys.load(fours[(chunk + AHEAD) % SLOTS], chunk + AHEAD);
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      uint32_t k_frag[2];
      widen<KV>(k_frag, fours[chunk % SLOTS][tile]);
      mma_m16n8k16<__half>(scores[tile], q_frag[chunk], k_frag[0], k_frag[1]);
    }
  }
}

// acc += p v, with p (16 x 32) as the accumulators of its scores. acc[2 * chunk], of row g, has dims 4t and 4t+2 of
// the chunk, acc[2 * chunk + 1] has 4t+1 and 4t+3.
template <typename KV, int HEAD_DIM>
__device__ __forceinline__ void warp_gemm_8bit(float (&acc)[HEAD_DIM / 8][4], const float (&p)[4][4],
                                               const KeyRows<HEAD_DIM>& values) {
  constexpr int CHUNKS = HEAD_DIM / 16, AHEAD = k8BitAhead<HEAD_DIM>, SLOTS = AHEAD + 1;
  uint32_t fours[SLOTS][4];
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) values.load_transposed(fours[i], i);
  uint32_t p_frag[2][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float (&tile)[4] = p[i / 4 * 2 + i % 4 / 2];
    p_frag[i / 4][i % 4] = pack_pair<__half>(tile[2 * (i % 2)], tile[2 * (i % 2) + 1]);
  }
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    if (chunk + AHEAD < CHUNKS) values.load_transposed(fours[(chunk + AHEAD) % SLOTS], chunk + AHEAD);
    uint32_t v_frag[4][2];  // of eight keys: even dims, odd dims
#pragma unroll
    for (int i = 0; i < 4; ++i) widen<KV>(v_frag[i], __byte_perm(fours[chunk % SLOTS][i], 0, 0x3120));
#pragma unroll
    for (int kk = 0; kk < 2; ++kk) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        mma_m16n8k16<__half>(acc[2 * chunk + odd], p_frag[kk], v_frag[2 * kk][odd], v_frag[2 * kk + 1][odd]);
      }
    }
  }
}

}  // namespace fastattn
