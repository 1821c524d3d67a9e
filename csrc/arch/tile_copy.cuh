// Copies of tiles between global and swizzled shared memory (arch/swizzle.cuh), by all threads of a CTA.
#pragma once

#include <cstdint>

#include "arch/cp_async.cuh"
#include "arch/swizzle.cuh"

namespace fastattn {

// A thread's place in loads and stores of tiles by a CTA: chunks first_chunk, + kLanes, .. of every kRowsPerPass-th
// row.
template <int COLS, int THREADS>
struct ChunkOfThread {
  static constexpr int kChunks = COLS / 8;
  // Threads along a row: all of its chunks, or a power of two that divides them.
  static constexpr int kLanes = (kChunks & (kChunks - 1)) == 0 ? kChunks : kChunks & -kChunks;
  static constexpr int kRowsPerPass = THREADS / kLanes;
  const int row = threadIdx.x / kLanes;
  const int chunk = threadIdx.x % kLanes;

  // Byte offset in a swizzled tile of the thread's first chunk in its first row. From it those of all its chunks follow
  // with constants: no bit of a pass's first row is one of the thread's, nor one of a later chunk's number swizzled.
  __device__ __forceinline__ uint32_t offset() const { return swizzled<COLS>(row, chunk) * 2; }
  static __device__ __forceinline__ uint32_t at(uint32_t offset, int pass, int chunk_idx) {
    const int pass_row = pass * kRowsPerPass;
    const int swizzle = swizzled<COLS>(pass_row, 0) - pass_row * COLS;
    return (offset ^ swizzle * 2) + pass_row * COLS * 2 + chunk_idx * kLanes * 16;
  }
};

// Asks for ROWS x COLS elements; rows from valid_rows on and chunks from valid_chunks on are zeros. At least one row is
// valid.
template <int ROWS, int COLS, int THREADS, typename T>
__device__ __forceinline__ void load_tile(T* tile, const T* rows, int64_t stride, int32_t valid_rows,
                                          int32_t valid_chunks) {
  using Place = ChunkOfThread<COLS, THREADS>;
  static_assert(ROWS % Place::kRowsPerPass == 0, "passes of the threads fill a tile");
  const Place place;
#pragma unroll
  for (int i = 0; i < ROWS / Place::kRowsPerPass; ++i) {
    const int row = place.row + i * Place::kRowsPerPass;
#pragma unroll
    for (int j = 0; j < Place::kChunks / Place::kLanes; ++j) {
      const int chunk = place.chunk + j * Place::kLanes;
      const bool valid = row < valid_rows && chunk < valid_chunks;
      cp_async_16(tile + swizzled<COLS>(row, chunk), valid ? rows + row * stride + chunk * 8 : rows, valid);
    }
  }
}

// Writes the valid part of a tile.
template <int ROWS, int COLS, int THREADS, typename T>
__device__ __forceinline__ void store_tile(T* rows, int64_t stride, const T* tile, int32_t valid_rows,
                                           int32_t valid_chunks) {
  using Place = ChunkOfThread<COLS, THREADS>;
  const Place place;
  for (int row = place.row; row < ROWS && row < valid_rows; row += Place::kRowsPerPass) {
#pragma unroll
    for (int j = 0; j < Place::kChunks / Place::kLanes; ++j) {
      const int chunk = place.chunk + j * Place::kLanes;
      if (chunk >= valid_chunks) continue;
      *reinterpret_cast<uint4*>(rows + row * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + swizzled<COLS>(row, chunk));
    }
  }
}

}  // namespace fastattn
