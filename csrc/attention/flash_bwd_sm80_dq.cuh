// dQ alone, for the deterministic backward: a CTA owns a block of queries of one head and walks over the keys that they
// see, in order. S and dP are computed a second time, which is the price.
//
//                keys of a step
//             ┌──────────────────┐       step n   wait K(n), V(n) │ barrier │ issue K(n+1), V(n+1) │
//   16 rows   │      warp 0      │                S = Q K^T │ P │ dP = dO V^T │ dS, in registers │ dQ += dS K
//   16 rows   │      warp 1      │
//     ...     │       ...        │       Shared memory: Q, dO, and two stages each of K and V.
//             └──────────────────┘
#pragma once

#include <cstdint>

#include "arch/warp_gemm_sm80.cuh"
#include "attention/flash_bwd_sm80_tiles.cuh"

namespace fastattn {

template <typename T, int HEAD_DIM>
struct FlashBwdSm80DqStorage {
  static constexpr FlashBwdSm80DqTile kTile = flash_bwd_sm80_dq_tile(HEAD_DIM);
  static constexpr int kNumThreads = kTile.num_threads();

  alignas(128) T q[kTile.block_m * HEAD_DIM];  // later dq
  alignas(128) T dout[kTile.block_m * HEAD_DIM];
  alignas(128) T k[2][kTile.block_n * HEAD_DIM];
  alignas(128) T v[2][kTile.block_n * HEAD_DIM];
};

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(flash_bwd_sm80_dq_tile(HEAD_DIM).num_threads(), 1)
    flash_bwd_sm80_dq_kernel(const __grid_constant__ FlashBwdSm80Params p, const ScoreScale score_scale) {
  using Storage = FlashBwdSm80DqStorage<T, HEAD_DIM>;
  constexpr int BLOCK_M = Storage::kTile.block_m;
  constexpr int BLOCK_N = Storage::kTile.block_n;
  constexpr int THREADS = Storage::kNumThreads;

  constexpr int AHEAD = 2;  // loads ahead of the products, see warp_gemm

  extern __shared__ __align__(128) unsigned char smem_bytes[];
  Storage& smem = *reinterpret_cast<Storage*>(smem_bytes);

  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * 16;

  // ---- which queries. The last come first: with a causal mask they see most keys.
  const int32_t num_m_blocks = static_cast<int32_t>(p.config.num_dq_m_blocks);
  const int32_t m_block = num_m_blocks - 1 - static_cast<int32_t>(blockIdx.x % num_m_blocks);
  const int32_t head_idx = blockIdx.x / num_m_blocks % p.num_heads;
  const int32_t kv_head_idx = head_idx / (p.num_heads / p.num_kv_heads);
  const BwdSequence sequence(p, blockIdx.x / num_m_blocks / p.num_heads, p.config.tile.block_m);
  const int32_t q_len = sequence.q_len, k_len = sequence.k_len;
  const int32_t first_row = m_block * BLOCK_M;
  if (first_row >= q_len) return;
  const int32_t num_rows = min(BLOCK_M, q_len - first_row);

  // ---- which keys: ranges move right with the query
  const BwdScores to_probabilities = {
      {q_len, k_len, p.window_left, p.window_right}, score_scale, alibi_slope(p, sequence.seq_idx, head_idx)};
  const int32_t key_begin = to_probabilities.mask.visible(first_row).begin;
  const int32_t key_end = to_probabilities.mask.visible(first_row + num_rows - 1).end;
  int32_t step = key_begin / BLOCK_N;
  const int32_t end_step = key_begin < key_end ? (key_end + BLOCK_N - 1) / BLOCK_N : step;

  const int32_t head_chunks = p.head_dim / 8;
  const int32_t v_chunks = p.v_head_dim / 8;
  const auto load_step = [&](int stage, int32_t load_step) {
    const int32_t first = load_step * BLOCK_N;
    load_tile<BLOCK_N, HEAD_DIM, THREADS>(smem.k[stage], sequence.rows<T>(p.k, sequence.k_start, first, kv_head_idx),
                                          p.k.token_stride, k_len - first, head_chunks);
    load_tile<BLOCK_N, HEAD_DIM, THREADS>(smem.v[stage], sequence.rows<T>(p.v, sequence.k_start, first, kv_head_idx),
                                          p.v.token_stride, k_len - first, v_chunks);
  };
  if (step < end_step) {
    load_tile<BLOCK_M, HEAD_DIM, THREADS>(smem.q, sequence.rows<T>(p.q, sequence.q_start, first_row, head_idx),
                                          p.q.token_stride, num_rows, head_chunks);
    load_tile<BLOCK_M, HEAD_DIM, THREADS>(smem.dout, sequence.rows<T>(p.dout, sequence.q_start, first_row, head_idx),
                                          p.dout.token_stride, num_rows, v_chunks);
    load_step(0, step);
  }
  cp_async_commit();

  // Rows behind the end of a block of the main kernel's have no place in the workspaces.
  float lse[1][2], delta[1][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp_row + half * 8 + lane / 4;
    const int64_t padded_row = head_idx * p.config.padded_tokens + sequence.padded_start + first_row + row;
    lse[0][half] = row < num_rows ? p.lse_base2[padded_row] : INFINITY;
    delta[0][half] = row < num_rows ? p.delta[padded_row] : 0.0f;
  }

  float dq[1][HEAD_DIM / 8][4] = {};
  for (int stage = 0; step < end_step; ++step, stage ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    if (step + 1 < end_step) load_step(stage ^ 1, step + 1);
    cp_async_commit();

    float scores[1][BLOCK_N / 8][4] = {};
    warp_gemm<T, HEAD_DIM / 16, AHEAD>(scores, WarpOperandA<HEAD_DIM>(smem.q, warp_row),
                                       WarpOperandB<HEAD_DIM>(smem.k[stage], 0));
    to_probabilities.probabilities<BLOCK_N>(scores, lse, first_row + warp_row + lane / 4,
                                            step * BLOCK_N + 2 * (lane % 4), first_row, first_row + num_rows - 1,
                                            step * BLOCK_N, [](int, int, int, float, float) {});
    float dp[1][BLOCK_N / 8][4] = {};
    warp_gemm<T, HEAD_DIM / 16, AHEAD>(dp, WarpOperandA<HEAD_DIM>(smem.dout, warp_row),
                                       WarpOperandB<HEAD_DIM>(smem.v[stage], 0));
#pragma unroll
    for (int n = 0; n < BLOCK_N / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[0][n][i] *= dp[0][n][i] - delta[0][i / 2];
    }
    warp_gemm_registers<T, AHEAD>(dq, scores, WarpOperandB<HEAD_DIM, true>(smem.k[stage], 0));
  }

  // ---- epilogue, through Q's place
  cp_async_wait<0>();
  __syncthreads();
  WarpResult<HEAD_DIM>(smem.q, warp_row, 0).template store_all<T>(dq, p.softmax_scale);
  __syncthreads();
  store_tile<BLOCK_M, HEAD_DIM, THREADS>(sequence.rows<T>(p.dq, sequence.q_start, first_row, head_idx),
                                         p.dq.token_stride, smem.q, num_rows, head_chunks);
}

template <typename T, int HEAD_DIM>
cudaError_t launch_flash_bwd_sm80_dq(const FlashBwdSm80Params& p, ScoreScale scale, cudaStream_t stream) {
  constexpr int kSmemBytes = sizeof(FlashBwdSm80DqStorage<T, HEAD_DIM>);
  const int64_t num_ctas = p.config.num_dq_m_blocks * p.num_heads * p.num_seqs;
  if (num_ctas == 0) return cudaSuccess;
  if (num_ctas > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = flash_bwd_sm80_dq_kernel<T, HEAD_DIM>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(num_ctas), p.config.dq_tile.num_threads(), kSmemBytes, stream>>>(p, scale);
  return cudaGetLastError();
}

}  // namespace fastattn
