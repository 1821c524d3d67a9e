// Weights of 4 bits into tiles (fastattn/reference/w4_tiles.py has the formulas): a CTA has 16 rows and 1024
// columns, a thread one word of each tile.
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "gemm/w4_tiles.h"

namespace fastattn {
namespace {

constexpr int kTilesThreads = 128, kTiles = 16;

__device__ __forceinline__ uint32_t rotated(uint32_t word, int left) { return word << left | word >> (32 - left); }

// Two neighbouring codes, the even column's in the low half, with sign, exponent and mantissa where bf16 has them.
__device__ __forceinline__ uint32_t e2m1_pair_bits(uint32_t byte) {
  return (byte & 0x07u) << 6 | (byte & 0x08u) << 12 | (byte & 0x70u) << 18 | (byte & 0x80u) << 24;
}

// Bytes of two codes, columns 2 t and 2 t + 8 of rows g and g + 8, into a word.
template <W4Order ORDER>
__device__ __forceinline__ uint32_t word_of_pairs(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  if constexpr (ORDER == W4Order::kInt4) {
    const auto nibbles = [](uint32_t byte) { return (byte & 15u) | (byte & 0xf0u) << 12; };
    return nibbles(a) | nibbles(b) << 4 | nibbles(c) << 8 | nibbles(d) << 12;
  } else {
    const uint32_t third = e2m1_pair_bits(c), fourth = e2m1_pair_bits(d);
    uint32_t word = e2m1_pair_bits(a) | rotated(e2m1_pair_bits(b), 20);
    word |= (fourth ^ rotated(word, 8)) >> 2 & 0x20202020u;
    word |= (third ^ word << 2) >> 6 & 0x02060206u;
    word |= rotated(fourth ^ word << 2, 24) & 0x00010001u;
    word |= (third ^ word << 6) >> 2 & 0x00100010u;
    return word | (rotated(fourth ^ word << 2, 24) & 0x40004000u);
  }
}

// Four neighbouring codes of either row.
__device__ __forceinline__ uint32_t word_of_fours(uint32_t first, uint32_t second) {
  uint32_t word = (first & 0x7777u) | (second & 0x7777u) << 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    word |= (first >> (4 * i + 3) & 1u) << (8 * i + 7) | (second >> (4 * i + 3) & 1u) << (8 * i + 3);
  }
  return word;
}

template <W4Order ORDER>
__global__ void __launch_bounds__(kTilesThreads) w4_tiles_kernel(const __grid_constant__ W4TilesParams p) {
  grid_dependency_launch();
  grid_dependency_wait();
  static __shared__ int shifts[16];  // from a row's scales to those in tiles
  const int thread = static_cast<int>(threadIdx.x), lane = thread / 4, word = thread % 4;
  const int64_t num_tiles = p.k / 64, num_parts = (num_tiles + kTiles - 1) / kTiles, groups = 64 / p.group_size;
  const int64_t row_tile = blockIdx.x / num_parts, first_row = row_tile * 16;
  const int64_t first_tile = blockIdx.x % num_parts * kTiles, end_tile = min(first_tile + kTiles, num_tiles);
  if (p.scale != nullptr && p.group_size == 32) {  // eight threads a row
    const int64_t row = first_row + thread / 8;
    int largest = 7;  // of fewer the global scale would leave fp32
    for (int64_t g = thread % 8; g < num_tiles * groups; g += 8) {
      const int bits = p.scale[row * p.scale_stride + g];
      if (bits != 255) largest = max(largest, bits);
    }
#pragma unroll
    for (int i = 1; i < 8; i *= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, i));
    if (thread % 8 == 0) {  // by each of the row's CTAs the same
      shifts[thread / 8] = 133 - largest;
      const float given = p.global_scale != nullptr ? p.global_scale[row] : 1.0f;
      p.scaled_globally[row] = given * __uint_as_float(static_cast<uint32_t>(133 - largest + 127) << 23);
    }
  }
  __syncthreads();
  const uint8_t* const first = p.packed + (first_row + lane / 4) * p.packed_stride;
  const uint8_t* const second = first + 8 * p.packed_stride;
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const int64_t place = (row_tile * num_tiles + tile) * kTilesThreads + thread;
    const int64_t byte = tile * 32 + word * 8;  // of 16 columns
    if constexpr (ORDER == W4Order::kFp8) {
      const int64_t own = byte + lane % 4 * 2;
      p.tiles[place] = word_of_fours(*reinterpret_cast<const uint16_t*>(first + own),
                                     *reinterpret_cast<const uint16_t*>(second + own));
    } else {
      const int64_t own = byte + lane % 4;
      p.tiles[place] = word_of_pairs<ORDER>(first[own], second[own], first[own + 4], second[own + 4]);
    }
    if (p.scale == nullptr || thread >= 16 * groups) continue;
    const int row = thread / static_cast<int>(groups) % 2 * 8 + thread / static_cast<int>(2 * groups);
    const int bits = p.scale[(first_row + row) * p.scale_stride + tile * groups + thread % groups];
    const int moved = p.group_size == 16 || bits == 255 ? bits : max(bits + shifts[row], 0);
    p.scale_tiles[(row_tile * num_tiles + tile) * 16 * groups + thread] = static_cast<uint8_t>(moved);
  }
}

}  // namespace

cudaError_t w4_tiles(const W4TilesParams& p, cudaStream_t stream) {
  const auto kernel = p.order == W4Order::kFp4    ? w4_tiles_kernel<W4Order::kFp4>
                      : p.order == W4Order::kInt4 ? w4_tiles_kernel<W4Order::kInt4>
                                                  : w4_tiles_kernel<W4Order::kFp8>;
  return launch_kernel_behind(kernel, p.n / 16 * ((p.k / 64 + kTiles - 1) / kTiles), kTilesThreads, 0, stream, p);
}

}  // namespace fastattn
