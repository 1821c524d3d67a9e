// What the CTAs of a cluster have each summed up of a tile, in their shared memory, and how it becomes rows of out.
#pragma once

#include <cstdint>
#include <type_traits>

#include "arch/cluster.cuh"

namespace fastattn {

// Nothing beside the sums.
struct GemmSm90NoOthers {
  struct Total {};
  __device__ __forceinline__ void add_to(Total&, int, int32_t, int32_t) const {}
};

// Sums, floats or int32, of ROWS rows of x for COLUMNS rows of weight, of NUM_WARPS warps that have 16 of the latter
// each; where these are more than there are, several parts of each sum.
template <typename Sum, int ROWS, int COLUMNS, int NUM_WARPS>
struct GemmSm90Sums {
  static constexpr int kParts = 16 * NUM_WARPS / COLUMNS;
  static constexpr int kLanesOfRow = COLUMNS / 4;
  using Four = std::conditional_t<std::is_same_v<Sum, float>, float4, int4>;

  // Rows are 4 sums apart modulo 16, so that the accumulators of a warp go to all banks.
  Sum values[kParts][ROWS][COLUMNS + 4];

  // By a warp: its accumulators.
  __device__ __forceinline__ void keep(const Sum (&acc)[ROWS / 8][4], int warp_idx, int lane) {
    const int part = kParts > 1 ? warp_idx / (COLUMNS / 16) : 0;
    const int column = (warp_idx - part * (COLUMNS / 16)) * 16 + lane / 4;
#pragma unroll
    for (int t = 0; t < ROWS / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[part][t * 8 + lane % 4 * 2 + i % 2][column + i / 2 * 8] = acc[t][i];
    }
  }

  // The first of the four columns that a thread adds up.
  __device__ __forceinline__ static int first_column() { return static_cast<int>(threadIdx.x % kLanesOfRow) * 4; }

  // And of so many rows at once, which the CTAs take in turns, its first.
  static constexpr int kRowsAtOnce = 32 * NUM_WARPS / kLanesOfRow;
  __device__ __forceinline__ static int32_t first_row(int32_t rank) {
    return rank * kRowsAtOnce + static_cast<int32_t>(threadIdx.x) / kLanesOfRow;
  }

  // Behind the cluster's barrier: adds up what all CTAs have, in their order, for this one's share of the rows:
  // store(row, sums, total), the latter of what else there is of each row: others.add_to(total, part, row, split).
  template <typename Store, typename Others>
  __device__ __forceinline__ void add_up(int32_t num_rows, int32_t rank, int32_t num_splits, const Others& others,
                                         Store store) {
    const int column = first_column();
    for (int32_t row = first_row(rank); row < num_rows; row += num_splits * kRowsAtOnce) {
      Four sum = {};
      typename Others::Total total;
#pragma unroll 4
      for (int32_t split = 0; split < num_splits; ++split) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const Four value = load_cluster<Four>(cluster_address(&values[part][row][column], split));
          sum.x += value.x;
          sum.y += value.y;
          sum.z += value.z;
          sum.w += value.w;
          others.add_to(total, part, row, split);
        }
      }
      store(row, sum, total);
    }
  }
};

}  // namespace fastattn
