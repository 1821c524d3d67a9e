// The passes before and behind the main kernel of flash_bwd_sm80 (what they are for is said there).
#pragma once

#include <cstdint>

#include "arch/vec.cuh"
#include "arch/warp_gemm_sm80.cuh"
#include "attention/flash_bwd_sm80_tiles.cuh"

namespace fastattn {

template <int HEAD_DIM, bool LARGE>
inline constexpr FlashBwdSm80Tile kFlashBwdSm80Tile = flash_bwd_sm80_tile(HEAD_DIM, LARGE);

// ---------------------------------------------------------------------------------------------
// dq's accumulators: a block of queries x HEAD_DIM in the order of the main kernel's fragments, four of a lane
// together. On sm_90 one instruction adds the four; before, each of them is coalesced over the lanes.

template <int TILES>
__device__ __forceinline__ float* dq_slots(float* block, int tile) {
  const int lane = threadIdx.x % 32;
  float* const tile_slots = block + (threadIdx.x / 32 * TILES + tile) * 128;
#if __CUDA_ARCH__ >= 900
  return tile_slots + lane * 4;
#else
  return tile_slots + lane;
#endif
}

template <int TILES_M, int TILES_N>
__device__ __forceinline__ void add_to_dq_accum(float* block, const float (&dq)[TILES_M][TILES_N][4]) {
#pragma unroll
  for (int tile = 0; tile < TILES_M * TILES_N; ++tile) {
    const float (&values)[4] = dq[tile / TILES_N][tile % TILES_N];
    float* const slots = dq_slots<TILES_M * TILES_N>(block, tile);
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(slots), "f"(values[0]), "f"(values[1]),
                 "f"(values[2]), "f"(values[3])
                 : "memory");
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) atomicAdd(slots + i * 32, values[i]);
#endif
  }
}

template <int TILES_M, int TILES_N>
__device__ __forceinline__ void load_dq_accum(float* block, float (&dq)[TILES_M][TILES_N][4]) {
#pragma unroll
  for (int tile = 0; tile < TILES_M * TILES_N; ++tile) {
    float (&values)[4] = dq[tile / TILES_N][tile % TILES_N];
    const float* const slots = dq_slots<TILES_M * TILES_N>(block, tile);
#if __CUDA_ARCH__ >= 900
    load_vec(slots, values);
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = slots[i * 32];
#endif
  }
}

// ---------------------------------------------------------------------------------------------
// dk and dv of CTAs that share the heads of a group.

// A warp's results; `first_row` and `first_col` are its own, num_rows how many rows from there count.
template <int HEAD_DIM, int WARPS, int TILES_M, int TILES_N>
__device__ __forceinline__ void write_partial(float* partial, int64_t first_row, int32_t row_stride, int32_t num_rows,
                                              int32_t first_col, const float (&acc)[TILES_M][TILES_N][4], float scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = m * 16 + half * 8 + lane / 4;
      if (row >= num_rows) continue;
      float* const out = partial + (first_row + row * row_stride) * HEAD_DIM + first_col + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < TILES_N; ++n) {
        *reinterpret_cast<float2*>(out + n / 2 * 16 * WARPS + n % 2 * 8) =
            make_float2(acc[m][n][2 * half] * scale, acc[m][n][2 * half + 1] * scale);
      }
    }
  }
}

// Adds them up in the order of the heads. A CTA for each block of keys of each KV head.
template <typename T, int HEAD_DIM, bool LARGE>
__global__ void __launch_bounds__(kFlashBwdSm80Threads)
    flash_bwd_sm80_sum(const __grid_constant__ FlashBwdSm80Params p) {
  constexpr int BLOCK_N = kFlashBwdSm80Tile<HEAD_DIM, LARGE>.block_n;
  const BwdKeyBlock block(p, blockIdx.x, 1);
  const BwdSequence sequence(p, block.seq_idx, kFlashBwdSm80Tile<HEAD_DIM, LARGE>.block_m);
  const int32_t first_key = block.n_block * BLOCK_N;
  const int32_t num_keys = min(BLOCK_N, sequence.k_len - first_key);
  const int64_t first_row = block.partial_row(p, sequence, first_key, 0);
  const int64_t split_stride = (block.partial_row(p, sequence, first_key, 1) - first_row) * HEAD_DIM;
  const auto sum = [&](const float* partial, T* out, int64_t stride, int32_t head_dim) {
#pragma unroll 1
    for (int32_t row = threadIdx.x / 32; row < num_keys; row += kFlashBwdSm80Warps) {
      const float* const part_row = partial + (first_row + row * p.num_kv_heads) * HEAD_DIM;
#pragma unroll 1
      for (int32_t dim = threadIdx.x % 32 * 4; dim < head_dim; dim += 128) {
        float total[4] = {};
        for (int32_t split = 0; split < p.config.num_splits; ++split) {
          float part[4];
          load_vec(part_row + split * split_stride + dim, part);
#pragma unroll
          for (int j = 0; j < 4; ++j) total[j] += part[j];
        }
        store_vec(out + row * stride + dim, total);
      }
    }
  };
  sum(p.dk_partial, sequence.rows<T>(p.dk, sequence.k_start, first_key, block.kv_head_idx), p.dk.token_stride,
      p.head_dim);
  sum(p.dv_partial, sequence.rows<T>(p.dv, sequence.k_start, first_key, block.kv_head_idx), p.dv.token_stride,
      p.v_head_dim);
}

// ---------------------------------------------------------------------------------------------
// Prepare: a CTA for each block of queries of each head, eight lanes a row.

template <typename T, int HEAD_DIM, bool LARGE>
__global__ void __launch_bounds__(kFlashBwdSm80Threads)
    flash_bwd_sm80_prepare(const __grid_constant__ FlashBwdSm80Params p) {
  constexpr int BLOCK_M = kFlashBwdSm80Tile<HEAD_DIM, LARGE>.block_m;
  const int32_t num_m_blocks = static_cast<int32_t>(p.config.num_m_blocks);
  const int32_t first_row = static_cast<int32_t>(blockIdx.x % num_m_blocks) * BLOCK_M;
  const int32_t head_idx = blockIdx.x / num_m_blocks % p.num_heads;
  const BwdSequence sequence(p, blockIdx.x / num_m_blocks / p.num_heads, BLOCK_M);
  if (first_row >= sequence.q_len) return;

  const int64_t padded_row = head_idx * p.config.padded_tokens + sequence.padded_start + first_row;
  if (p.dq_accum != nullptr) {
    float4* const accum = reinterpret_cast<float4*>(p.dq_accum + padded_row * HEAD_DIM);
    for (int i = threadIdx.x; i < BLOCK_M * HEAD_DIM / 4; i += kFlashBwdSm80Threads) {
      accum[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }

  const int lane = threadIdx.x % 8;
  const T* const out = sequence.rows<T>(p.out, sequence.q_start, first_row, head_idx);
  const T* const dout = sequence.rows<T>(p.dout, sequence.q_start, first_row, head_idx);
#pragma unroll
  for (int row = threadIdx.x / 8; row < BLOCK_M; row += kFlashBwdSm80Threads / 8) {
    const bool valid = first_row + row < sequence.q_len;
    float sum = 0.0f;
    if (valid) {
      for (int dim = lane * 8; dim < p.v_head_dim; dim += 64) {
        float a[8], b[8];
        load_vec(out + row * p.out.token_stride + dim, a);
        load_vec(dout + row * p.dout.token_stride + dim, b);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += a[i] * b[i];
      }
    }
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (lane != 0) continue;
    float lse = INFINITY;
    if (valid) {
      const int64_t token = static_cast<int64_t>(sequence.q_start) + first_row + row;
      lse = p.lse[sequence.seq_idx * p.lse_batch_stride + head_idx * p.lse_head_stride + token];
      if (p.dlse != nullptr) {
        sum -= p.dlse[sequence.seq_idx * p.dlse_batch_stride + head_idx * p.dlse_head_stride + token];
      }
    }
    const bool counts = lse > -INFINITY && lse < INFINITY;
    p.lse_base2[padded_row + row] = counts ? lse * kLog2E : INFINITY;
    p.delta[padded_row + row] = counts ? sum : 0.0f;
  }
}

// ---------------------------------------------------------------------------------------------
// Convert: a CTA for each block of queries of each head; a thread has what it would have in the main kernel.

template <typename T, int HEAD_DIM, bool LARGE>
__global__ void __launch_bounds__(kFlashBwdSm80Threads)
    flash_bwd_sm80_convert(const __grid_constant__ FlashBwdSm80Params p) {
  constexpr FlashBwdSm80Tile kTile = kFlashBwdSm80Tile<HEAD_DIM, LARGE>;
  constexpr int BLOCK_M = kTile.block_m;
  constexpr int DQ_ROWS = BLOCK_M / kTile.dq_warps_m;
  constexpr int DQ_WARPS = kFlashBwdSm80Warps / kTile.dq_warps_m;
  constexpr int DQ_COLS = HEAD_DIM / DQ_WARPS;
  __shared__ alignas(128) T tile[BLOCK_M * HEAD_DIM];

  const int32_t num_m_blocks = static_cast<int32_t>(p.config.num_m_blocks);
  const int32_t first_row = static_cast<int32_t>(blockIdx.x % num_m_blocks) * BLOCK_M;
  const int32_t head_idx = blockIdx.x / num_m_blocks % p.num_heads;
  const BwdSequence sequence(p, blockIdx.x / num_m_blocks / p.num_heads, BLOCK_M);
  if (first_row >= sequence.q_len) return;

  const int64_t padded_row = head_idx * p.config.padded_tokens + sequence.padded_start + first_row;
  const int warp_idx = threadIdx.x / 32;
  float dq[DQ_ROWS / 16][DQ_COLS / 8][4];
  load_dq_accum(p.dq_accum + padded_row * HEAD_DIM, dq);
  WarpResult<HEAD_DIM, DQ_WARPS>(tile, warp_idx % kTile.dq_warps_m * DQ_ROWS, warp_idx / kTile.dq_warps_m * 16)
      .template store_all<T>(dq, p.softmax_scale);
  __syncthreads();
  store_tile<BLOCK_M, HEAD_DIM, kFlashBwdSm80Threads>(sequence.rows<T>(p.dq, sequence.q_start, first_row, head_idx),
                                                      p.dq.token_stride, tile, sequence.q_len - first_row,
                                                      p.head_dim / 8);
}

}  // namespace fastattn
