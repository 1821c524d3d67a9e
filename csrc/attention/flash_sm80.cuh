// FlashAttention-2 style forward on mma.sync, one kernel for contiguous and paged K and V.
//
//   out[i, h, :] = sum_j p_ij v[j, h / G, :],  p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)
//   s_ij = softmax_scale * q[i, h, :] . k[j, h / G, :],  then softcap * tanh(s / softcap), ALiBi's bias, the mask
//   with sinks, lse_i is also over a logit sink[h], which has no value
//
//   q (T, H, D)   k (Tk, Hk, D)   v (Tk, Hk, Dv), or k, v in pages (num_blocks, block_size, Hk, D)   G = H / Hk
//   out (T, H, Dv)   lse (H, T) fp32   or all with a batch dimension in front
//   with out_scale, out is e4m3, of what it would be divided by that
//
// Grid: one CTA per (sequence, KV head, split of the keys, tile of rows). A tile's rows are the
// pairs (query token, head of the group) of one KV head, row r = token r / G, head r % G, so that a
// chunk of few tokens with G = 8 loads K and V once, not eight times. (With at most 16 rows it is paged_decode's.)
// CTAs are in the order of section_order.h, levels being tiles from the last rows on.
//
//                    keys of a step
//             ┌──────────────────────────┐
//   16 or 32  │          warp 0          │
//   rows      │          warp 1          │
//     ...     │           ...            │
//             └──────────────────────────┘
//
// Shared memory: Q, and one stage each of K and V, all swizzled (arch/swizzle.cuh). Every thread loads (cp.async,
// zero-filled outside the visible keys and past D) and every warp computes; two CTAs an SM: one computes while the
// other waits.
//
//   wait K(n) │ barrier │ issue V(n) │ S = Q K^T │ wait V(n) │ barrier │ issue K(n+1) │ mask, softmax │ O += P V
//
// A barrier also says that all warps are done with what is overwritten next.
//
// Splits: CTA s of S takes the s-th part of the visible steps, writes a normalized fp32 O and an LSE
// to the workspace, and flash_combine adds them in split order: two runs are bitwise equal. S
// depends on the sizes of the call, not on the lengths. Split 0 has the sink. With out_scale and no splits O goes to
// the workspace too, and each warp rounds its rows from there: in registers that would be the conversion's many
// instructions (before sm_89) once for each element.
//
// Poison: no key outside the union of the ranges that the tile's rows see is read, and no entry of
// the block table for one; their rows are zeros in shared memory (0 * NaN is NaN). A page number
// outside the cache gives a row of zeros. A key within that union that only some rows see is read
// and must be finite for all.
//
// Limits: D and Dv are multiples of 8 up to 256; T, Tk, q_len * G < 2^31; rows 16-byte aligned. On Hopper
// flash_fwd_sm90 takes its place for contiguous K and V with more than 16 rows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "arch/e4m3.cuh"
#include "arch/launch.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/recompute.cuh"
#include "arch/tile_copy.cuh"
#include "arch/warp_gemm_sm80.cuh"
#include "attention/flash_sm80_launch.h"
#include "attention/mask.cuh"
#include "attention/softmax.cuh"

namespace fastattn {

// ---------------------------------------------------------------------------------------------
// Where K and V live. A loader knows a sequence's length and the address of each key's row.

// One of K and V, for one KV head.
template <typename T>
struct KvOperand {
  const T* base;
  int64_t block_stride;
  int64_t token_stride;
};

// k (B, Sk, Hk, D), v (B, Sk, Hk, Dv), or sequences one after the other.
template <typename T>
struct ContiguousKv {
  static constexpr bool kContiguous = true;
  KvOperand<T> k, v;
  int32_t length;

  __device__ __forceinline__ ContiguousKv(const FlashSm80Params& p, int32_t seq_idx, int32_t kv_head_idx) {
    const bool packed = p.cu_seqlens_k != nullptr;
    const int32_t start = packed ? p.cu_seqlens_k[seq_idx] : 0;
    length = packed ? p.cu_seqlens_k[seq_idx + 1] - start : p.batch_k_len;
    if (p.seqused_k != nullptr) length = max(min(p.seqused_k[seq_idx], length), 0);
    const int64_t k_start = seq_idx * p.k_batch_stride + start * p.k_token_stride;
    const int64_t v_start = seq_idx * p.v_batch_stride + start * p.v_token_stride;
    k = {static_cast<const T*>(p.k) + kv_head_idx * p.k_head_stride + k_start, 0, p.k_token_stride};
    v = {static_cast<const T*>(p.v) + kv_head_idx * p.v_head_stride + v_start, 0, p.v_token_stride};
  }

  __device__ __forceinline__ const T* row(const KvOperand<T>& operand, int32_t key) const {
    return operand.base + key * operand.token_stride;
  }
};

// k, v (num_blocks, block_size, Hk, D); block_table (B, max_blocks) names a sequence's pages.
template <typename T>
struct PagedKv {
  static constexpr bool kContiguous = false;
  KvOperand<T> k, v;
  int32_t length;
  const int32_t* block_table;  // this sequence's row
  FastDivide block_size;
  int32_t num_blocks;

  __device__ __forceinline__ PagedKv(const FlashSm80Params& p, int32_t seq_idx, int32_t kv_head_idx)
      : block_size(p.block_size_div), num_blocks(p.num_blocks) {
    const int64_t capacity = static_cast<int64_t>(p.max_blocks) * p.block_size;
    length = static_cast<int32_t>(min(static_cast<int64_t>(max(p.seqused_k[seq_idx], 0)), capacity));
    block_table = p.block_table + seq_idx * p.block_table_stride;
    k = {static_cast<const T*>(p.k) + kv_head_idx * p.k_head_stride, p.k_block_stride, p.k_token_stride};
    v = {static_cast<const T*>(p.v) + kv_head_idx * p.v_head_stride, p.v_block_stride, p.v_token_stride};
  }

  // nullptr if the block table names a page that does not exist.
  __device__ __forceinline__ const T* row(const KvOperand<T>& operand, int32_t key) const {
    const int32_t entry = block_size.divide(key);
    const int32_t block = __ldg(block_table + entry);
    const int32_t offset = key - entry * block_size.divisor;
    if (block < 0 || block >= num_blocks) return nullptr;
    return operand.base + block * operand.block_stride + offset * operand.token_stride;
  }
};

// ---------------------------------------------------------------------------------------------
// Shared memory

template <typename T, int HEAD_DIM>
struct FlashSm80Storage {
  static constexpr FlashSm80Tile kTile = flash_sm80_tile(HEAD_DIM);
  static constexpr int kNumThreads = kTile.num_threads();

  alignas(128) T q[kTile.block_m * HEAD_DIM];  // later the rounded output
  alignas(128) T k[kTile.block_n * HEAD_DIM];
  alignas(128) T v[kTile.block_n * HEAD_DIM];
};

// ---------------------------------------------------------------------------------------------
// Kernel

// Bytes between the rows of contiguous K and V that a thread copies one after the other. Made on the host side, so that
// they are operands of additions and not computed in each step.
struct PassStrides {
  int64_t k, v;
};

template <typename T, int HEAD_DIM, typename KvLoader, typename Mask>
__global__ void __launch_bounds__(FlashSm80Storage<T, HEAD_DIM>::kNumThreads, 2)
    flash_sm80_kernel(const __grid_constant__ FlashSm80Params p, const ScoreScale score_scale,
                      const PassStrides pass_strides) {
  using Storage = FlashSm80Storage<T, HEAD_DIM>;
  constexpr FlashSm80Tile kTile = Storage::kTile;
  constexpr int BLOCK_M = kTile.block_m;
  constexpr int BLOCK_N = kTile.block_n;
  constexpr int NUM_THREADS = Storage::kNumThreads;
  constexpr int WARP_M = BLOCK_M / kTile.num_warps;  // rows of a warp
  constexpr int TILES_M = WARP_M / 16;
  constexpr int AHEAD = TILES_M == 1 ? 3 : 1;  // loads ahead of the products; with these little or nothing spills
  constexpr int CHUNKS = HEAD_DIM / 8;         // 16-byte pieces of a row
  using Place = ChunkOfThread<HEAD_DIM, NUM_THREADS>;
  constexpr int ROWS_PER_PASS = Place::kRowsPerPass;
  static_assert(WARP_M % 16 == 0 && BLOCK_N % 16 == 0, "products are of 16 rows, and consume P 16 keys at a time");
  static_assert(BLOCK_N % ROWS_PER_PASS == 0, "passes of the threads fill a tile");

  extern __shared__ __align__(128) unsigned char smem_bytes[];
  Storage& smem = *reinterpret_cast<Storage*>(smem_bytes);

  const int warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);  // else it is read anew in each step
  const int lane = threadIdx.x % 32;

  // ---- which tile. The last rows of all pairs come first: with a causal mask they have the most keys.
  const int32_t num_splits = p.config.num_splits;
  const auto [pair, level] = p.order.find(blockIdx.x);
  const int32_t m_tile = static_cast<int32_t>(p.config.num_m_tiles) - 1 - level;
  const int32_t split_idx = pair % num_splits;
  const int32_t seq_and_head = pair / num_splits;
  const int32_t kv_head_idx = seq_and_head % p.num_kv_heads;
  const int32_t seq_idx = seq_and_head / p.num_kv_heads;

  const bool packed_q = p.cu_seqlens_q != nullptr;
  const int32_t q_start = packed_q ? p.cu_seqlens_q[seq_idx] : 0;
  const int32_t all_q_len = packed_q ? p.cu_seqlens_q[seq_idx + 1] - q_start : p.batch_q_len;
  const int32_t q_len = p.seqused_q == nullptr ? all_q_len : max(min(p.seqused_q[seq_idx], all_q_len), 0);
  const int32_t group_size = p.group_size.divisor;
  const int32_t num_rows = q_len * group_size;
  const int32_t first_row = m_tile * BLOCK_M;
  if (first_row >= all_q_len * group_size) return;
  if (all_q_len < p.min_q_len || all_q_len > p.max_q_len) return;

  // ---- where the results go
  const int32_t v_chunks = p.v_head_dim / 8;
  const int64_t lse_stride = packed_q ? p.num_tokens : p.batch_q_len;
  // Read again where it is used: it is not needed during the loop.
  const auto first_token = [&](int64_t of_batch) {
    return packed_q ? static_cast<int64_t>(p.cu_seqlens_q[seq_idx]) : recompute(seq_idx) * of_batch;
  };
  T* const out = static_cast<T*>(p.out);
  const bool in_e4m3 = !KvLoader::kContiguous && p.out_scale != nullptr;
  float* const partial_out =
      num_splits > 1 || in_e4m3 ? p.partial_out + split_idx * p.num_tokens * p.num_heads * p.v_head_dim : nullptr;
  float* const lse = num_splits > 1 ? p.partial_lse + split_idx * p.num_tokens * p.num_heads : p.lse;

  const auto row_head = [&](int32_t row) { return kv_head_idx * group_size + p.group_size.remainder(row); };
  // Offsets of a row's head in out (and partial_out) and of its entry in lse.
  const auto out_offset = [&](int32_t row) {
    const int32_t token_size = p.num_heads * p.v_head_dim;
    return first_token(p.batch_q_len) * token_size + static_cast<int64_t>(p.group_size.divide(row)) * token_size +
           row_head(row) * p.v_head_dim;
  };
  const auto lse_offset = [&](int32_t row) {
    return first_token(p.num_heads * lse_stride) + row_head(row) * lse_stride + p.group_size.divide(row);
  };
  // The sink of a row's head in base 2, -inf for none.
  const auto row_sink = [&](int32_t row) {
    return p.sinks != nullptr && split_idx == 0 ? p.sinks[row_head(row)] * kLog2E : -INFINITY;
  };

  // A thread's place in loads and stores by all: f(chunk) for each of its chunks of a row.
  const Place place;
  const auto each_chunk = [&](auto f) {
#pragma unroll
    for (int j = 0; j < CHUNKS / Place::kLanes; ++j) f(place.chunk + j * Place::kLanes);
  };

  // Rows that see nothing: zeros, and the LSE of the sink. The combination ignores O where the LSE is -inf.
  const auto write_empty_rows = [&](int32_t begin, int32_t end, bool with_sink) {
    for (int32_t row = begin + place.row; row < end; row += ROWS_PER_PASS) {
      if (place.chunk == 0) lse[lse_offset(row)] = with_sink ? row_sink(row) * kLn2 : -INFINITY;
      each_chunk([&](int chunk) {
        if (chunk >= v_chunks) return;
        if (num_splits > 1) {
          float4* const row_out = reinterpret_cast<float4*>(partial_out + out_offset(row) + chunk * 8);
          row_out[0] = row_out[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        } else if (in_e4m3) {
          *reinterpret_cast<uint2*>(static_cast<uint8_t*>(p.out) + out_offset(row) + chunk * 8) = make_uint2(0, 0);
        } else {
          *reinterpret_cast<uint4*>(out + out_offset(row) + chunk * 8) = make_uint4(0, 0, 0, 0);
        }
      });
    }
  };
  if (q_len < all_q_len) {
    write_empty_rows(max(first_row, num_rows), min(first_row + BLOCK_M, all_q_len * group_size), false);
    if (first_row >= num_rows) return;
  }

  // ---- which keys
  const KvLoader kv(p, seq_idx, kv_head_idx);
  const Mask mask = Mask::make(p, q_len, kv.length, q_start);
  const int32_t last_row = min(first_row + BLOCK_M, num_rows) - 1;
  const int32_t tile_token = p.group_size.divide(first_row), last_token = p.group_size.divide(last_row);
  const KeyRange seen_by_any = mask.seen_by_any(tile_token, last_token);
  const KeyRange seen_by_all = mask.seen_by_all(tile_token, last_token);

  int32_t step = seen_by_any.begin / BLOCK_N;
  int32_t end_step = step;
  if (seen_by_any.begin < seen_by_any.end) {
    end_step = (seen_by_any.end + BLOCK_N - 1) / BLOCK_N;
    const int32_t steps_per_split = (end_step - step + num_splits - 1) / num_splits;
    step = min(step + split_idx * steps_per_split, end_step);
    end_step = min(step + steps_per_split, end_step);
  }
  if (step >= end_step) {
    write_empty_rows(first_row, last_row + 1, true);
    return;
  }

  // ---- loads
  const int32_t head_chunks = p.head_dim / 8;
  const auto load_q = [&] {
    const T* const q = static_cast<const T*>(p.q) + seq_idx * p.q_batch_stride + first_token(0) * p.q_token_stride +
                       kv_head_idx * group_size * p.q_head_stride;
#pragma unroll
    for (int i = 0; i < (BLOCK_M + ROWS_PER_PASS - 1) / ROWS_PER_PASS; ++i) {
      const int tile_row = place.row + i * ROWS_PER_PASS;
      if (BLOCK_M % ROWS_PER_PASS != 0 && tile_row >= BLOCK_M) continue;
      const int32_t row = first_row + tile_row;
      const int32_t safe_row = min(row, last_row);
      const T* const source =
          q + p.group_size.divide(safe_row) * p.q_token_stride + p.group_size.remainder(safe_row) * p.q_head_stride;
      each_chunk([&](int chunk) {
        const bool valid = row <= last_row && chunk < head_chunks;
        cp_async_16(smem.q + swizzled<HEAD_DIM>(tile_row, chunk), valid ? source + chunk * 8 : source, valid);
      });
    }
  };
  // Of contiguous keys: the thread's first chunk in its first row of the next step. Steps advance it, so that an
  // address costs one addition a row.
  const auto first_source = [&](const KvOperand<T>& operand) -> const char* {
    if (!KvLoader::kContiguous) return nullptr;
    return reinterpret_cast<const char*>(kv.row(operand, step * BLOCK_N + place.row) + place.chunk * 8);
  };
  const char* next_k = first_source(kv.k);
  const char* next_v = first_source(kv.v);
  const uint32_t place_offset = computed_once(place.offset());
  const auto load_kv = [&](const KvOperand<T>& operand, const char*& next, int64_t pass_stride, int32_t operand_chunks,
                           const T* tile, int32_t load_step) {
    const int32_t first_key = load_step * BLOCK_N;
    const uint32_t target = shared_address(tile) + place_offset;
    const bool all_seen = first_key >= seen_by_any.begin && first_key + BLOCK_N <= seen_by_any.end;
    if (KvLoader::kContiguous && all_seen) {  // most steps; a chunk behind the row's end is not read
#pragma unroll
      for (int i = 0; i < BLOCK_N / ROWS_PER_PASS; ++i) {
#pragma unroll
        for (int j = 0; j < CHUNKS / Place::kLanes; ++j) {
          cp_async_16(Place::at(target, i, j), next + j * Place::kLanes * 16,
                      place.chunk + j * Place::kLanes < operand_chunks);
        }
        next += pass_stride;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < BLOCK_N / ROWS_PER_PASS; ++i) {
      const int32_t key = first_key + place.row + i * ROWS_PER_PASS;
      const bool seen = key >= seen_by_any.begin && key < seen_by_any.end;
      const T* row = nullptr;
      if (seen) row = KvLoader::kContiguous ? reinterpret_cast<const T*>(next) : kv.row(operand, key);
      const T* const source = KvLoader::kContiguous ? row : row + place.chunk * 8;
#pragma unroll
      for (int j = 0; j < CHUNKS / Place::kLanes; ++j) {
        const bool valid = row != nullptr && place.chunk + j * Place::kLanes < operand_chunks;
        cp_async_16(Place::at(target, i, j), valid ? source + j * Place::kLanes * 8 : static_cast<const T*>(p.k),
                    valid);
      }
      next += KvLoader::kContiguous ? pass_stride : 0;
    }
  };

  load_q();
  load_kv(kv.k, next_k, pass_strides.k, head_chunks, smem.k, step);
  cp_async_commit();

  // ---- main loop
  const int warp_row = warp_idx * WARP_M;
  const bool warp_has_rows = first_row + warp_row <= last_row;
  // The row of a lane's scores [m][..][2 * half ..]; behind the end it is the last one again.
  const auto lane_row = [&](int m, int half) {
    return min(recompute(first_row + warp_row + m * 16 + half * 8 + lane / 4), last_row);
  };
  // Softcap and ALiBi give scores in base 2; without them the softmax scales.
  const bool general = score_scale.softcap > 0.0f || p.alibi_slopes != nullptr;
  const float softmax_scale = general ? 1.0f : score_scale.pre;
  // Keys whose products are scores as they are, for all rows.
  const KeyRange plain_keys = general ? KeyRange{0, 0} : seen_by_all;

  WarpOperandA<HEAD_DIM> queries(smem.q, warp_row);
  WarpOperandB<HEAD_DIM> keys(smem.k, 0);
  WarpOperandB<HEAD_DIM, true> values(smem.v, 0);
  for (uint32_t* address : {&queries.lane.address, &keys.lane.address, &values.lane.address}) {
    *address = computed_once(*address);
  }

  OnlineSoftmax<TILES_M> softmax;
  float acc[TILES_M][HEAD_DIM / 8][4] = {};

  for (; step < end_step; ++step) {
    cp_async_wait<0>();
    __syncthreads();
    load_kv(kv.v, next_v, pass_strides.v, v_chunks, smem.v, step);
    cp_async_commit();

    float scores[TILES_M][BLOCK_N / 8]
                [4];  // zeros only where products follow, the first of which need none in registers
    if (warp_has_rows) {
#pragma unroll
      for (int i = 0; i < TILES_M * BLOCK_N / 8; ++i) {
#pragma unroll
        for (float& score : scores[i / (BLOCK_N / 8)][i % (BLOCK_N / 8)]) score = 0.0f;
      }
      warp_gemm<T, HEAD_DIM / 16, AHEAD>(scores, queries, keys);
    }
    cp_async_wait<0>();
    __syncthreads();
    if (step + 1 < end_step) load_kv(kv.k, next_k, pass_strides.k, head_chunks, smem.k, step + 1);
    cp_async_commit();

    if (warp_has_rows) {
      const int32_t first_key = step * BLOCK_N;
      const int32_t lane_key = first_key + 2 * (lane % 4);
      if (first_key < plain_keys.begin || first_key + BLOCK_N > plain_keys.end) {
        if (general) {
#pragma unroll
          for (int i = 0; i < 2 * TILES_M; ++i) {
            const int32_t row = lane_row(i / 2, i % 2);
            const typename Mask::Row mask_row = mask.row(p.group_size.divide(row));
            const float slope = p.alibi_slopes == nullptr
                                    ? 0.0f
                                    : kLog2E * p.alibi_slopes[seq_idx * p.alibi_batch_stride + row_head(row)];
#pragma unroll
            for (int j = 0; j < BLOCK_N / 4; ++j) {
              float& score = scores[i / 2][j / 2][i % 2 * 2 + j % 2];
              score *= score_scale.pre;
              if (score_scale.softcap > 0.0f) score = score_scale.softcap * tanh_exp2(score);
              score -= slope * mask_row.distance(lane_key + j / 2 * 8 + j % 2);
            }
          }
        }
        if (first_key < seen_by_all.begin || first_key + BLOCK_N > seen_by_all.end) {
#pragma unroll
          for (int i = 0; i < 2 * TILES_M; ++i) {
            const typename Mask::Row mask_row = mask.row(p.group_size.divide(lane_row(i / 2, i % 2)));
#pragma unroll
            for (int j = 0; j < BLOCK_N / 4; ++j) {
              if (!mask_row.sees(lane_key + j / 2 * 8 + j % 2)) scores[i / 2][j / 2][i % 2 * 2 + j % 2] = -INFINITY;
            }
          }
        }
      }
      softmax.update(scores, acc, softmax_scale);
      warp_gemm_registers<T, AHEAD>(acc, scores, values);
    }
  }
  cp_async_wait<0>();
  softmax.finish(softmax_scale);

  // ---- epilogue
  // A warp owns its rows: no other warp is involved from here on.
#pragma unroll
  for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = first_row + warp_row + m * 16 + half * 8 + lane / 4;
      const RowResult result =
          finish_row(softmax.row_max[m][half], softmax.row_sum[m][half], row_sink(min(row, last_row)));
#pragma unroll
      for (int nn = 0; nn < HEAD_DIM / 8; ++nn) {
        acc[m][nn][2 * half] *= result.inverse;
        acc[m][nn][2 * half + 1] *= result.inverse;
      }
      if (row > last_row) continue;
      if (lane % 4 == 0) lse[lse_offset(row)] = result.lse;
      if (num_splits > 1 || in_e4m3) {
        float* const row_out = partial_out + out_offset(row) + 2 * (lane % 4);
#pragma unroll
        for (int nn = 0; nn < HEAD_DIM / 8; ++nn) {
          if (nn < v_chunks) {
            *reinterpret_cast<float2*>(row_out + nn * 8) = make_float2(acc[m][nn][2 * half], acc[m][nn][2 * half + 1]);
          }
        }
      }
    }
  }
  if (num_splits > 1) return;
  if (in_e4m3) {
    __syncwarp();  // the other lanes' parts of the rows are there
    const float inverse = 1.0f / *p.out_scale;
#pragma unroll 1
    for (int i = lane; i < WARP_M * HEAD_DIM / 4; i += 32) {
      const int32_t row = first_row + warp_row + i / (HEAD_DIM / 4), dim = i % (HEAD_DIM / 4) * 4;
      if (row > last_row || dim >= p.v_head_dim) continue;
      const int64_t element = out_offset(row) + dim;
      const float4 x = *reinterpret_cast<const float4*>(partial_out + element);
      *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.out) + element) =
          pack_e4m3(x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse);
    }
  } else {
    // Through the warp's own rows of Q, so that global stores are whole rows.
    WarpResult<HEAD_DIM>(smem.q, warp_row, 0).template store_all<T>(acc, 1.0f);
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < WARP_M * CHUNKS; i += 32) {
      const int tile_row = warp_row + i / CHUNKS;
      const int32_t row = first_row + tile_row;
      if (row <= last_row && i % CHUNKS < v_chunks) {
        *reinterpret_cast<uint4*>(out + out_offset(row) + (i % CHUNKS) * 8) =
            *reinterpret_cast<const uint4*>(smem.q + swizzled<HEAD_DIM>(tile_row, i % CHUNKS));
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename T, int HEAD_DIM, typename KvLoader, typename Mask>
cudaError_t launch_flash_sm80(const FlashSm80Params& p, cudaStream_t stream) {
  constexpr int kSmemBytes = sizeof(FlashSm80Storage<T, HEAD_DIM>);
  static_assert(kSmemBytes <= 99 * 1024, "the limit of sm_86 and sm_89");
  const int64_t num_ctas = p.config.num_m_tiles * p.config.num_splits * p.num_kv_heads * p.num_seqs;
  constexpr int64_t kPassBytes = ChunkOfThread<HEAD_DIM, FlashSm80Storage<T, HEAD_DIM>::kNumThreads>::kRowsPerPass * 2;
  return launch_kernel(flash_sm80_kernel<T, HEAD_DIM, KvLoader, Mask>, num_ctas, p.config.tile.num_threads(),
                       kSmemBytes, stream, p, ScoreScale::make(p.softmax_scale, p.softcap),
                       PassStrides{p.k_token_stride * kPassBytes, p.v_token_stride * kPassBytes});
}

}  // namespace fastattn
