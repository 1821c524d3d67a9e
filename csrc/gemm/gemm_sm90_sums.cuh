// What the CTAs of a cluster have each summed up of a tile, in their shared memory, and how it becomes rows of out.
#pragma once

#include <cstdint>

#include "arch/cluster.cuh"

namespace fastattn {

// Sums of ROWS rows of x for COLUMNS rows of weight, of NUM_WARPS warps that have 16 of the latter each.
template <int ROWS, int COLUMNS, int NUM_WARPS>
struct GemmSm90Sums {
  // Rows are 4 floats apart modulo 16, so that the accumulators of a warp go to all banks.
  float values[ROWS][COLUMNS + 4];

  // By a warp: its accumulators, with rows of weight 16 `warp_idx` and on.
  __device__ __forceinline__ void keep(const float (&acc)[ROWS / 8][4], int warp_idx, int lane) {
    const int column = warp_idx * 16 + lane / 4;
#pragma unroll
    for (int t = 0; t < ROWS / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[t * 8 + lane % 4 * 2 + i % 2][column + i / 2 * 8] = acc[t][i];
    }
  }

  // Behind the cluster's barrier: adds up what all CTAs have, in their order, for this one's share of the rows, four
  // columns a lane: store(row, sum).
  template <typename Store>
  __device__ __forceinline__ void add_up(int32_t num_rows, int32_t rank, int32_t num_splits, Store store) {
    constexpr int ROWS_AT_ONCE = 32 * NUM_WARPS / (COLUMNS / 4);
    const int column = first_column(threadIdx.x);
    const int32_t first_row = rank * ROWS_AT_ONCE + static_cast<int32_t>(threadIdx.x) / (COLUMNS / 4);
    for (int32_t row = first_row; row < num_rows; row += num_splits * ROWS_AT_ONCE) {
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
      for (int32_t split = 0; split < num_splits; ++split) {
        const float4 value = load_cluster<float4>(cluster_address(&values[row][column], split));
        sum.x += value.x;
        sum.y += value.y;
        sum.z += value.z;
        sum.w += value.w;
      }
      store(row, sum);
    }
  }
  __device__ __forceinline__ static int first_column(unsigned thread_idx) {
    return static_cast<int>(thread_idx % (COLUMNS / 4)) * 4;
  }
};

}  // namespace fastattn
