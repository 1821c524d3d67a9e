// What fp8 adds to the Hopper attention kernel: V turned around in shared memory, and P rounded to e4m3.
//
// wgmma sums over bytes that lie side by side, so that O = P V needs V with the keys of one column in a row. Two orders
// are free to choose, since a sum does not care: that of the keys, as long as P has the same, and that of O's columns,
// as long as they are written where they belong. Both are chosen such that nothing moves between lanes:
//
//   keys, in each 16:     position 4 t + r holds key 2 t + r % 2 + 8 (r / 2)   a lane's own scores of two tiles are the
//                                                                              four neighbours that an A fragment wants
//   columns, in each 16:  row n holds column 2 (n % 8) + n / 8                 even columns first, as ldmatrix pairs
//   them
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "arch/e4m3.cuh"
#include "arch/mbarrier.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/panel_swizzle.cuh"

namespace fastattn {

// Keys of a row of V turned around that lie side by side.
template <int BLOCK_N>
constexpr int kKeyPanel = BLOCK_N % 128 == 0 ? 128 : 64;

// One of NUM_WARPS warps turns its share of a block of V, (BLOCK_N, V_HEAD_DIM) in panels of V_PANEL columns, into
// `turned`, (V_HEAD_DIM, BLOCK_N) in panels of keys. CLEAR: keys from num_keys on become zeros.
//
// 16 columns at a time, of all keys. Addresses are sums and xors of what the lane knows and of constants: the swizzle
// of 8 rows is the lane's, whichever rows they are.
template <int BLOCK_N, int V_HEAD_DIM, int V_PANEL, int NUM_WARPS, bool CLEAR>
__device__ __forceinline__ void turn_values(const void* values, void* turned, int32_t num_keys, uint32_t warp,
                                            uint32_t lane) {
  constexpr uint32_t KEY_PANEL = kKeyPanel<BLOCK_N>;
  const uint32_t source_row = shared_address(values) + lane * V_PANEL;
  const uint32_t source_swizzle = swizzled<V_PANEL>(lane * V_PANEL) ^ lane * V_PANEL;
  const uint32_t row = lane / 8 % 2 * 8 + lane % 8;
  const uint32_t target_row = shared_address(turned) + (swizzled<KEY_PANEL>(row * KEY_PANEL) ^ lane / 16 * 16);
#pragma unroll 1
  for (uint32_t column = warp * 16; column < V_HEAD_DIM; column += NUM_WARPS * 16) {
    const uint32_t source = source_row + column / V_PANEL * BLOCK_N * V_PANEL + (column % V_PANEL ^ source_swizzle);
    const uint32_t target = target_row + column * KEY_PANEL;
#pragma unroll
    for (uint32_t k = 0; k < BLOCK_N / 32; k += 2) {  // two at a time: registers are short here
      constexpr uint32_t LAST = BLOCK_N / 32 - 1;
      uint32_t r[2][4];  // of keys 8 i + 2 t and + 1: columns 2 g and 2 g + 1
#pragma unroll
      for (uint32_t j = 0; j < 2; ++j) {
        if (k + j > LAST) break;
        ldmatrix_x4_trans(r[j], source + (k + j) * 32 * V_PANEL);
      }
#pragma unroll
      for (uint32_t j = 0; j < 2; ++j) {
        if (k + j > LAST) break;
        const uint32_t first_key = (k + j) * 32;
        if (CLEAR) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int32_t key = static_cast<int32_t>(first_key + i * 8 + lane % 4 * 2);
            r[j][i] &= (key < num_keys ? 0x0000ffffu : 0u) | (key + 1 < num_keys ? 0xffff0000u : 0u);
          }
        }
        const uint32_t even0 = __byte_perm(r[j][0], r[j][1], 0x6420), odd0 = __byte_perm(r[j][0], r[j][1], 0x7531);
        const uint32_t even1 = __byte_perm(r[j][2], r[j][3], 0x6420), odd1 = __byte_perm(r[j][2], r[j][3], 0x7531);
        const uint32_t address = (target ^ first_key % KEY_PANEL) + first_key / KEY_PANEL * V_HEAD_DIM * KEY_PANEL;
        store_matrices(address, {even0, odd0, even1, odd1});
      }
    }
  }
}

}  // namespace fastattn
