// What the Hopper GEMM for many rows adds to a warp's rows before it rounds them, and the squares of what it writes
// then (GemmSm90Added, of gemm_sm90_stores.cuh):
//
//                          BLOCK_N columns, in chunks of 32
//             ┌─────────────┬─────────────┬─────────────┬─────────────┬─
//   8 rows    │ lanes 0 - 3 │             │             │             │     a lane asks for 16 bytes of each of
//   of 16     │ lanes 4 - 7 │             │             │             │     its two rows, some chunks ahead;
//             │      …      │             │             │             │     shuffles give it the columns that it
//             └─────────────┴─────────────┴─────────────┴─────────────┴─    has sums of
//             └── squares ──┘ one number of each row, in its place of (M, N / 32)
//
// Lines are asked for as far as L2 when a tile begins, the first chunks behind its last products.
#pragma once

#include <cstdint>

#include "arch/fragments.cuh"
#include "arch/global_memory.cuh"
#include "arch/pair.cuh"
#include "gemm/gemm_sm90_operands.cuh"

namespace fastattn {

// Of other epilogues: nothing.
struct GemmSm90NothingAdded {
  template <typename Params>
  __device__ __forceinline__ GemmSm90NothingAdded(const Params&, int32_t, int32_t, int32_t, int) {}
  __device__ __forceinline__ void prefetch() const {}
  __device__ __forceinline__ void begin() const {}
};

// Chunks are counted with the halves of 64 rows beside each other, as they are stored.
template <typename T, int HALVES, int BLOCK_N>
struct GemmSm90AddedRows {
  static constexpr int kChunks = BLOCK_N / 32 * HALVES;
  // Chunks on their way, as many as there are registers for. In turns none: the other group's products hide what is
  // waited for.
  static constexpr int kAhead = HALVES == 1 ? 2 : 0, kSlots = kAhead == 0 ? 1 : kAhead;
  const GemmSm90AddedParams& p;
  int32_t row, column, end_row;  // of a lane's first 8 columns; where rows end
  int lane;
  uint4 asked[kSlots][2];

  // first_row: of the warp, whose rows end at `end`.
  __device__ __forceinline__ GemmSm90AddedRows(const GemmSm90AddedParams& params, int32_t first_row, int32_t end,
                                               int32_t first_n, int of_lane)
      : p(params), row(first_row + of_lane / 4), column(first_n + of_lane % 4 * 8), end_row(end), lane(of_lane) {}

  __device__ __forceinline__ const T* address(int32_t of_row, int32_t of_column) const {
    return static_cast<const T*>(p.residual) + of_row * p.residual_stride + of_column;
  }

  __device__ __forceinline__ bool has(int row_offset, int column_offset) const {
    return row + row_offset < end_row && column + column_offset < static_cast<int32_t>(p.n);
  }

  // Asks for a tile's lines, as far as L2.
  __device__ __forceinline__ void prefetch() const {
#pragma unroll
    for (int of_line = 0; of_line < BLOCK_N; of_line += 64) {
#pragma unroll
      for (int offset = 0; offset < 64 * HALVES; offset += offset % 64 == 0 ? 8 : 56) {
        // One of a row's four lanes asks for a line.
        if (lane % 4 == of_line / 64 % 4 && has(offset, of_line - lane % 4 * 8)) {
          prefetch_l2(address(row + offset, column + of_line - lane % 4 * 8));
        }
      }
    }
  }

  // Asks for the first chunks.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int chunk = 0; chunk < kAhead; ++chunk) ask(chunk);
  }

  // Adds a chunk's to its sums: four tiles of eight columns.
  __device__ __forceinline__ void add_to(float (&values)[4][4], int chunk) {
    if constexpr (kAhead == 0) ask(chunk);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint4& of_row = asked[chunk % kSlots][r];
      uint32_t words[4] = {of_row.x, of_row.y, of_row.z, of_row.w};
      gather_columns(words, lane);  // which undoes itself
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_pair<T>(words[i]);
        values[i][2 * r] += pair.x;
        values[i][2 * r + 1] += pair.y;
      }
    }
    if (kAhead > 0 && chunk + kAhead < kChunks) ask(chunk + kAhead);
  }

  // Writes what a lane has of a chunk's row, 8 columns, by whole warps. No pointer to a row of out is kept: there are
  // no registers for it.
  __device__ __forceinline__ void store(const uint32_t (&words)[4], int chunk, int r) {
    const int half = chunk % HALVES, first = chunk / HALVES * 32, offset = half * 64 + 8 * r;
    if (has(offset, first)) {
      T* const out = static_cast<T*>(p.out) + (row + offset) * p.n + column + first;
      *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (p.squares == nullptr) return;
    float sum = 0.0f;
    if (column + first < static_cast<int32_t>(p.n)) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack_pair<T>(words[i]);
        sum += pair.x * pair.x;
        sum += pair.y * pair.y;
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0 && has(offset, first)) {
      p.squares[(row + offset) * num_squares_parts(p.n) + (column + first) / kGemmSm90SquaresPart] = sum;
    }
  }

 private:
  __device__ __forceinline__ void ask(int chunk) {
    const int half = chunk % HALVES, first = chunk / HALVES * 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int offset = half * 64 + 8 * r;
      uint4& words = asked[chunk % kSlots][r];
      words = make_uint4(0, 0, 0, 0);
      if (has(offset, first)) words = load_early(reinterpret_cast<const uint4*>(address(row + offset, column + first)));
    }
  }
};

}  // namespace fastattn
