// How rows of out leave the Hopper GEMMs whose left operand is the weight, for many rows of x: a group's sums have rows
// of weight in lanes and rows of x in registers, so that a column's factor and bias are a lane's own. Rounded they go
// through shared memory, tiles of 8 x 8 being transposed, and leave by 128 bytes of a row of out.
#pragma once

#include <cstdint>

#include "arch/mbarrier.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/vec.cuh"

namespace fastattn {

// Of a group's tile ROWS rows of out at a time, rounded, on their way to memory, and what they are multiplied by.
template <typename T, int BLOCK_M, bool SCALED, int ROWS>
struct GemmSm90TransposedRows {
  static_assert(BLOCK_M % ROWS == 0 && 128 % ROWS == 0 && ROWS % 16 == 0);
  alignas(128) unsigned char staged[ROWS][128];  // in each row chunks of 16 bytes change places
  alignas(16) float x_scales[SCALED ? ROWS : 1];

  // What a thread of the group is to have of the rows' scales: scale_of(row).
  using OwnScales = float[2];
  template <typename ScaleOf>
  __device__ __forceinline__ static void fetch(OwnScales& own, int32_t first_m, int32_t end_m, ScaleOf scale_of) {
    if constexpr (SCALED) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int32_t row = first_m + i * 128 + static_cast<int32_t>(threadIdx.x) % 128;
        own[i] = row < end_m ? scale_of(row) : 0.0f;
      }
    }
  }

  // By the same: 64 columns of out (.., n), rows first_m to end_m. A warp has 16 of them, a lane the sums of two, 8
  // apart, with `factors` and `bias`.
  template <typename Sum>
  __device__ __forceinline__ void store(const Sum (&acc)[BLOCK_M / 8][4], const OwnScales& own,
                                        const float (&factors)[2], const float (&bias)[2], T* rows_of_out, int64_t n,
                                        int32_t first_m, int32_t end_m, int32_t first_n, int barrier) {
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
    // A warp stores four tiles of 8 x 8 at once, both halves of its 16 columns for 16 rows; a lane says where one of
    // the 8 rows of one of them goes. Of what lies there then, eight lanes write a row.
    const uint32_t base = shared_address(staged);
    const uint32_t target =
        base + (lane / 16 * 8 + lane % 8) * 128 + ((thread / 32 * 2 + lane / 8 % 2) ^ lane % 8) * 16;
    const int32_t row = thread / 8, column = first_n + thread % 8 * 8;
    const uint32_t source = base + row * 128 + (thread % 8 ^ row % 8) * 16;
    const int32_t num_rows = column < n ? end_m - first_m : 0;
    T* const out = rows_of_out + (first_m + row) * n + column;
#pragma unroll
    for (int first = 0; first < BLOCK_M; first += ROWS) {
      if constexpr (SCALED) {
        if (thread / ROWS == first / ROWS % (128 / ROWS)) x_scales[thread % ROWS] = own[first / 128];
      }
      named_barrier_sync(barrier, 128);  // what was staged has been read
#pragma unroll
      for (int t = 0; t < ROWS / 8; t += 2) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int tile = first / 8 + t + i / 2, half = i % 2, row_of_lane = (t + i / 2) * 8 + lane % 4 * 2;
          float2 scales = {1.0f, 1.0f};
          if constexpr (SCALED) scales = *reinterpret_cast<const float2*>(&x_scales[row_of_lane]);
          const float first_sum = static_cast<float>(acc[tile][2 * half]);
          const float second_sum = static_cast<float>(acc[tile][2 * half + 1]);
          w[i] = pack_pair<T>(first_sum * (scales.x * factors[half]) + bias[half],
                              second_sum * (scales.y * factors[half]) + bias[half]);
        }
        store_matrices_trans(target + t * 8 * 128, w);
      }
      named_barrier_sync(barrier, 128);
      uint4 chunks[ROWS / 16];
#pragma unroll
      for (int i = 0; i < ROWS / 16; ++i) chunks[i] = load_shared_16_bytes(source + i * 16 * 128);
#pragma unroll
      for (int i = 0; i < ROWS / 16; ++i) {
        const int32_t place = first + i * 16;
        if (place + row < num_rows) *reinterpret_cast<uint4*>(out + place * n) = chunks[i];
      }
    }
  }
};

}  // namespace fastattn
