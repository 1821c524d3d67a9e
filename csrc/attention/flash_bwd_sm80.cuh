// FlashAttention-2 style backward on mma.sync.
//
//   s_ij = softcap(softmax_scale * q_i . k_j) + bias, masked     p_ij = exp(s_ij - lse_i)
//   dv_j = sum_i p_ij dout_i                                     delta_i = dout_i . out_i - dlse_i
//   ds_ij = p_ij (dout_i . v_j - delta_i) * softcap'             dq_i = scale * sum_j ds_ij k_j
//                                                                dk_j = scale * sum_i ds_ij q_i
//
//   q, dq (B, Sq, H, D)   k, dk (B, Sk, Hk, D)   v, dv (B, Sk, Hk, Dv)   out, dout (B, Sq, H, Dv), or packed
//
// Up to five launches, one after the other:
//
//   prepare   delta, LSE in base 2 (inf for rows that give nothing), dq's accumulators cleared
//   main      a CTA owns a block of keys of one KV head, and walks over the blocks of queries that see it, of all heads
//             of the group: dk and dv stay in its registers, and GQA needs no workspace
//   sum       dk and dv of CTAs that share the heads of a group, if there are (few KV heads, short sequences)
//   convert   dq's fp32 accumulators, scaled and rounded   (or, if deterministic, `dq`: flash_bwd_sm80_dq.cuh)
//   clear     gradients of tokens that belong to no sequence, if there can be any
//
//                             keys of the CTA
//                       ┌────────────────────────┐      8 warps cut each product's result in their own way,
//        queries of     │ S, dP: 2 x 4 warps     │      at D = 128:
//          a step       └────────────────────────┘        dQ (queries x dims)  2 x 4, added to memory
//                        │ P, dS, through shared          dV, dK (keys x dims) 4 x 2, in registers
//                        ▼ memory
//                  dV += P^T dO    dK += dS^T Q    dQ = dS K
//
//   step n     wait Q(n), dO(n) │ barrier │ issue Q(n+1), dO(n+1) │ S = Q K^T │ P │ dP = dO V^T │ dS │
//              barrier │ dV += P^T dO │ dQ = dS K, added │ dK += dS^T Q
//
// Shared memory: K, V; two stages each of Q and dO; P and dS; all swizzled (arch/swizzle.cuh).
//
// Order: sections of 16 (KV head, sequence) pairs, so that CTAs that run at a time share Q and dO in the L2 cache; in
// each the first blocks of keys first: with a causal mask they are seen by most queries, and the end is even.
//
// dq is added with atomics in fp32, each thread's accumulators in one run of 16 bytes, in the order of the fragments:
// only `convert`, whose threads stand for the same ones, reads them. The sums' order is that of time: `deterministic`
// computes dq apart, with 7 products instead of 5.
//
// Poison: no row of a sequence behind what counts of it is read, of any tensor; such rows are zeros in shared memory.
// The workspaces are written before they are read.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "arch/warp_gemm_sm80.cuh"
#include "attention/flash_bwd_sm80_dq.cuh"
#include "attention/flash_bwd_sm80_launch.h"
#include "attention/flash_bwd_sm80_passes.cuh"
#include "attention/flash_bwd_sm80_tiles.cuh"

namespace fastattn {

template <typename T, int HEAD_DIM, bool LARGE>
struct FlashBwdSm80Storage {
  static constexpr FlashBwdSm80Tile kTile = flash_bwd_sm80_tile(HEAD_DIM, LARGE);

  alignas(128) T k[kTile.block_n * HEAD_DIM];  // later dk
  alignas(128) T v[kTile.block_n * HEAD_DIM];  // later dv
  alignas(128) T q[2][kTile.block_m * HEAD_DIM];
  alignas(128) T dout[2][kTile.block_m * HEAD_DIM];
  alignas(128) T p[kTile.block_m * kTile.block_n];
  alignas(128) T ds[kTile.block_m * kTile.block_n];
};

template <typename T, int HEAD_DIM, bool LARGE>
__global__ void __launch_bounds__(kFlashBwdSm80Threads, 1)
    flash_bwd_sm80_kernel(const __grid_constant__ FlashBwdSm80Params p, const ScoreScale score_scale) {
  using Storage = FlashBwdSm80Storage<T, HEAD_DIM, LARGE>;
  constexpr FlashBwdSm80Tile kTile = Storage::kTile;
  constexpr int BLOCK_M = kTile.block_m;
  constexpr int BLOCK_N = kTile.block_n;
  constexpr int WARPS = kFlashBwdSm80Warps;
  constexpr int THREADS = kFlashBwdSm80Threads;
  // What one warp has of each result.
  constexpr int S_ROWS = BLOCK_M / kTile.s_warps_m;
  constexpr int S_COLS = BLOCK_N / (WARPS / kTile.s_warps_m);
  constexpr int KV_ROWS = BLOCK_N / kTile.kv_warps_n;
  constexpr int KV_WARPS = WARPS / kTile.kv_warps_n;  // that share the dims, in groups of 16
  constexpr int KV_COLS = HEAD_DIM / KV_WARPS;
  constexpr int DQ_ROWS = BLOCK_M / kTile.dq_warps_m;
  constexpr int DQ_WARPS = WARPS / kTile.dq_warps_m;
  constexpr int DQ_COLS = HEAD_DIM / DQ_WARPS;

  constexpr int AHEAD = HEAD_DIM == 256 ? 0 : 2;  // loads ahead of the products; with these little or nothing spills

  extern __shared__ __align__(128) unsigned char smem_bytes[];
  Storage& smem = *reinterpret_cast<Storage*>(smem_bytes);

  const int warp_idx = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;

  // ---- which keys
  const BwdKeyBlock block(p, blockIdx.x, p.config.num_splits);
  const int32_t kv_head_idx = block.kv_head_idx;
  const BwdSequence sequence(p, block.seq_idx, BLOCK_M);
  const int32_t q_len = sequence.q_len, k_len = sequence.k_len;
  const int32_t first_key = block.n_block * BLOCK_N;
  if (first_key >= k_len) return;
  const int32_t num_keys = min(BLOCK_N, k_len - first_key);

  // ---- which queries: those that see one of the keys
  const int32_t diagonal = first_key - (k_len - q_len);  // the query that stands at the first key
  int32_t q_begin = 0, q_end = q_len;
  if (p.window_right >= 0) q_begin = max(0, diagonal - p.window_right);
  if (p.window_left >= 0) q_end = min(q_len, diagonal + num_keys + p.window_left);
  const int32_t first_block = q_begin / BLOCK_M;
  const int32_t end_block = q_begin < q_end ? (q_end + BLOCK_M - 1) / BLOCK_M : first_block;
  const int32_t group_size = p.num_heads / p.num_kv_heads;
  const int32_t first_head = block.split_idx * p.config.heads_per_split;  // of the group
  const int32_t num_heads = min(p.config.heads_per_split, group_size - first_head);
  const int32_t num_steps = (end_block - first_block) * num_heads;

  const int32_t head_chunks = p.head_dim / 8;
  const int32_t v_chunks = p.v_head_dim / 8;

  // ---- places of this warp in the three kinds of results, and its operands
  const int s_row = warp_idx % kTile.s_warps_m * S_ROWS;
  const int s_col = warp_idx / kTile.s_warps_m * S_COLS;
  const int kv_row = warp_idx % kTile.kv_warps_n * KV_ROWS;
  const int kv_col = warp_idx / kTile.kv_warps_n * 16;
  const int dq_row = warp_idx % kTile.dq_warps_m * DQ_ROWS;
  const int dq_col = warp_idx / kTile.dq_warps_m * 16;

  float dk[KV_ROWS / 16][KV_COLS / 8][4] = {};
  float dv[KV_ROWS / 16][KV_COLS / 8][4] = {};

  // ---- loads
  int32_t load_head = kv_head_idx * group_size + first_head;
  int32_t load_block = first_block;
  const auto load_step = [&](int stage) {
    const int32_t first = load_block * BLOCK_M;
    load_tile<BLOCK_M, HEAD_DIM, THREADS>(smem.q[stage], sequence.rows<T>(p.q, sequence.q_start, first, load_head),
                                          p.q.token_stride, q_len - first, head_chunks);
    load_tile<BLOCK_M, HEAD_DIM, THREADS>(smem.dout[stage],
                                          sequence.rows<T>(p.dout, sequence.q_start, first, load_head),
                                          p.dout.token_stride, q_len - first, v_chunks);
    if (++load_block == end_block) {
      load_block = first_block;
      ++load_head;
    }
  };
  if (num_steps > 0) {
    load_tile<BLOCK_N, HEAD_DIM, THREADS>(smem.k, sequence.rows<T>(p.k, sequence.k_start, first_key, kv_head_idx),
                                          p.k.token_stride, num_keys, head_chunks);
    load_tile<BLOCK_N, HEAD_DIM, THREADS>(smem.v, sequence.rows<T>(p.v, sequence.k_start, first_key, kv_head_idx),
                                          p.v.token_stride, num_keys, v_chunks);
    load_step(0);
  }
  cp_async_commit();

  // ---- main loop
  BwdScores to_probabilities = {{q_len, k_len, p.window_left, p.window_right}, score_scale, 0.0f};
  int32_t head_idx = kv_head_idx * group_size + first_head;
  int32_t m_block = first_block;
  for (int32_t step = 0; step < num_steps; ++step) {
    const int stage = step & 1;
    cp_async_wait<0>();
    __syncthreads();
    if (step + 1 < num_steps) load_step(stage ^ 1);
    cp_async_commit();

    const int32_t first_row = m_block * BLOCK_M;
    const int64_t padded_row = head_idx * p.config.padded_tokens + sequence.padded_start + first_row;
    float lse[S_ROWS / 16][2], delta[S_ROWS / 16][2];
#pragma unroll
    for (int i = 0; i < S_ROWS / 8; ++i) {
      lse[i / 2][i % 2] = p.lse_base2[padded_row + s_row + lane / 4 + i * 8];
      delta[i / 2][i % 2] = p.delta[padded_row + s_row + lane / 4 + i * 8];
    }
    to_probabilities.slope = alibi_slope(p, sequence.seq_idx, head_idx);

    float scores[S_ROWS / 16][S_COLS / 8][4] = {};
    warp_gemm<T, HEAD_DIM / 16, AHEAD>(scores, WarpOperandA<HEAD_DIM>(smem.q[stage], s_row),
                                       WarpOperandB<HEAD_DIM>(smem.k, s_col));
    const WarpResult<BLOCK_N> p_out(smem.p, s_row, s_col);
    to_probabilities.probabilities<BLOCK_N>(
        scores, lse, first_row + s_row + lane / 4, first_key + s_col + 2 * (lane % 4), first_row,
        min(first_row + BLOCK_M, q_len) - 1, first_key,
        [&](int m, int n, int half, float p0, float p1) { p_out.store(m * 16 + half * 8, n, pack_pair<T>(p0, p1)); });

    float dp[S_ROWS / 16][S_COLS / 8][4] = {};
    warp_gemm<T, HEAD_DIM / 16, AHEAD>(dp, WarpOperandA<HEAD_DIM>(smem.dout[stage], s_row),
                                       WarpOperandB<HEAD_DIM>(smem.v, s_col));
    const WarpResult<BLOCK_N> ds_out(smem.ds, s_row, s_col);
#pragma unroll
    for (int m = 0; m < S_ROWS / 16; ++m) {
#pragma unroll
      for (int n = 0; n < S_COLS / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          ds_out.store(m * 16 + half * 8, n,
                       pack_pair<T>(scores[m][n][2 * half] * (dp[m][n][2 * half] - delta[m][half]),
                                    scores[m][n][2 * half + 1] * (dp[m][n][2 * half + 1] - delta[m][half])));
        }
      }
    }
    __syncthreads();

    warp_gemm<T, BLOCK_M / 16, AHEAD>(dv, WarpOperandA<BLOCK_N, true>(smem.p, kv_row),
                                      WarpOperandB<HEAD_DIM, true, KV_WARPS>(smem.dout[stage], kv_col));
    if (p.dq_accum != nullptr) {
      float dq[DQ_ROWS / 16][DQ_COLS / 8][4] = {};
      warp_gemm<T, BLOCK_N / 16, AHEAD>(dq, WarpOperandA<BLOCK_N>(smem.ds, dq_row),
                                        WarpOperandB<HEAD_DIM, true, DQ_WARPS>(smem.k, dq_col));
      add_to_dq_accum(p.dq_accum + padded_row * HEAD_DIM, dq);
    }
    warp_gemm<T, BLOCK_M / 16, AHEAD>(dk, WarpOperandA<BLOCK_N, true>(smem.ds, kv_row),
                                      WarpOperandB<HEAD_DIM, true, KV_WARPS>(smem.q[stage], kv_col));

    if (++m_block == end_block) {
      m_block = first_block;
      ++head_idx;
    }
  }

  // ---- epilogue
  if (p.config.num_splits > 1) {
    const int64_t first_row = block.partial_row(p, sequence, first_key, block.split_idx) + kv_row * p.num_kv_heads;
    write_partial<HEAD_DIM, KV_WARPS>(p.dk_partial, first_row, p.num_kv_heads, num_keys - kv_row, kv_col, dk,
                                      p.softmax_scale);
    write_partial<HEAD_DIM, KV_WARPS>(p.dv_partial, first_row, p.num_kv_heads, num_keys - kv_row, kv_col, dv, 1.0f);
    return;
  }
  // Through K's and V's place once all warps are done with them.
  cp_async_wait<0>();
  __syncthreads();
  WarpResult<HEAD_DIM, KV_WARPS>(smem.k, kv_row, kv_col).template store_all<T>(dk, p.softmax_scale);
  WarpResult<HEAD_DIM, KV_WARPS>(smem.v, kv_row, kv_col).template store_all<T>(dv, 1.0f);
  __syncthreads();
  store_tile<BLOCK_N, HEAD_DIM, THREADS>(sequence.rows<T>(p.dk, sequence.k_start, first_key, kv_head_idx),
                                         p.dk.token_stride, smem.k, num_keys, head_chunks);
  store_tile<BLOCK_N, HEAD_DIM, THREADS>(sequence.rows<T>(p.dv, sequence.k_start, first_key, kv_head_idx),
                                         p.dv.token_stride, smem.v, num_keys, v_chunks);
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename T, int HEAD_DIM, bool LARGE>
cudaError_t launch_flash_bwd_sm80(const FlashBwdSm80Params& p, cudaStream_t stream) {
  const ScoreScale scale = ScoreScale::make(p.softmax_scale, p.softcap);
  const int64_t num_heads = static_cast<int64_t>(p.num_heads) * p.num_seqs;
  const int64_t num_m_ctas = p.config.num_m_blocks * num_heads;
  const int64_t num_n_blocks = p.config.num_n_blocks * p.num_kv_heads * p.num_seqs;
  const int64_t num_n_ctas = num_n_blocks * p.config.num_splits;
  if (num_m_ctas > INT32_MAX || num_n_ctas > INT32_MAX) return cudaErrorInvalidConfiguration;

  if (num_m_ctas > 0) {
    flash_bwd_sm80_prepare<T, HEAD_DIM, LARGE>
        <<<static_cast<unsigned>(num_m_ctas), kFlashBwdSm80Threads, 0, stream>>>(p);
  }
  if (num_n_ctas > 0) {
    constexpr int kSmemBytes = sizeof(FlashBwdSm80Storage<T, HEAD_DIM, LARGE>);
    static_assert(kSmemBytes <= (LARGE ? 227 : 163) * 1024, "the limits of sm_90 and sm_80");
    static_assert(kSmemBytes == flash_bwd_sm80_smem_bytes(HEAD_DIM, LARGE));
    const auto kernel = flash_bwd_sm80_kernel<T, HEAD_DIM, LARGE>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSmemBytes);
    if (error != cudaSuccess) return error;
    kernel<<<static_cast<unsigned>(num_n_ctas), kFlashBwdSm80Threads, kSmemBytes, stream>>>(p, scale);
    if (p.config.num_splits > 1) {
      flash_bwd_sm80_sum<T, HEAD_DIM, LARGE>
          <<<static_cast<unsigned>(num_n_blocks), kFlashBwdSm80Threads, 0, stream>>>(p);
    }
  }
  if (p.dq_accum == nullptr) {
    const cudaError_t error = launch_flash_bwd_sm80_dq<T, HEAD_DIM>(p, scale, stream);
    if (error != cudaSuccess) return error;
  } else if (num_m_ctas > 0) {
    flash_bwd_sm80_convert<T, HEAD_DIM, LARGE>
        <<<static_cast<unsigned>(num_m_ctas), kFlashBwdSm80Threads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace fastattn
