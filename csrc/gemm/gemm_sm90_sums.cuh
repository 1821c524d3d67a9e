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
// each; where these are more than there are, several parts of each sum. PER_COLUMN of them, 1 or 2, make a column of
// out: those of gates lie in front of those of ups (gemm_sm90_epilogue.cuh).
template <typename Sum, int ROWS, int COLUMNS, int NUM_WARPS, int PER_COLUMN = 1>
struct GemmSm90Sums {
  static constexpr int kParts = 16 * NUM_WARPS / COLUMNS;
  static constexpr int kOutColumns = COLUMNS / PER_COLUMN;
  static constexpr int kLanesOfRow = kOutColumns / 4;
  using Four = std::conditional_t<std::is_same_v<Sum, float>, float4, int4>;

  // Rows are 4 sums apart modulo 16, so that the accumulators of a warp go to all banks.
  Sum values[kParts][ROWS][COLUMNS + 4];

  // By a warp: its accumulators.
  __device__ __forceinline__ void keep(const Sum (&acc)[ROWS / 8][4], int warp_idx, int lane) {
    const int part = kParts > 1 ? warp_idx / (COLUMNS / 16) : 0;
    const int column = (warp_idx - part * (COLUMNS / 16)) * (16 / PER_COLUMN) + lane / 4;
    constexpr int NEXT_EIGHT = PER_COLUMN == 1 ? 8 : kOutColumns;
#pragma unroll
    for (int t = 0; t < ROWS / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[part][t * 8 + lane % 4 * 2 + i % 2][column + i / 2 * NEXT_EIGHT] = acc[t][i];
    }
  }

  // The first of the four columns of out that a thread adds up.
  __device__ __forceinline__ static int first_column() { return static_cast<int>(threadIdx.x % kLanesOfRow) * 4; }

  // And of so many rows at once, which the CTAs take in turns, its first.
  static constexpr int kRowsAtOnce = 32 * NUM_WARPS / kLanesOfRow;
  __device__ __forceinline__ static int32_t first_row(int32_t rank) {
    return rank * kRowsAtOnce + static_cast<int32_t>(threadIdx.x) / kLanesOfRow;
  }

  // Behind the cluster's barrier: adds up what all CTAs have, in their order, for this one's share of the rows:
  // store(row, sums, total), PER_COLUMN times four sums, and the latter of what else there is of each row:
  // others.add_to(total, part, row, split). WHOLE_WARPS: a warp's lanes come to `store` together, with rows that are
  // not there among them.
  template <bool WHOLE_WARPS = false, typename Store, typename Others>
  __device__ __forceinline__ void add_up(int32_t num_rows, int32_t rank, int32_t num_splits, const Others& others,
                                         Store store) {
    constexpr int AT_ONCE = 4 / PER_COLUMN;  // more would take registers that two CTAs an SM do not have
    const int column = first_column();
    const int32_t behind_warp = WHOLE_WARPS ? static_cast<int32_t>(threadIdx.x) % 32 / kLanesOfRow : 0;
    for (int32_t row = first_row(rank); row - behind_warp < num_rows; row += num_splits * kRowsAtOnce) {
      Four sums[PER_COLUMN] = {};
      typename Others::Total total;
#pragma unroll AT_ONCE
      for (int32_t split = 0; split < num_splits; ++split) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int i = 0; i < PER_COLUMN; ++i) {
            const Sum* const of_columns = &values[part][row][column + i * kOutColumns];
            const Four value = load_cluster<Four>(cluster_address(of_columns, split));
            sums[i].x += value.x;
            sums[i].y += value.y;
            sums[i].z += value.z;
            sums[i].w += value.w;
          }
          others.add_to(total, part, row, split);
        }
      }
      store(row, sums, total);
    }
  }
};

}  // namespace fastattn
