// What surrounds flash_bwd_sm90.cuh's kernel: the numbers that each query row needs, and dQ rounded. Bound by memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "arch/fragments.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "attention/flash_bwd_sm90.h"
#include "attention/flash_bwd_sm90_launch.h"
#include "attention/flash_bwd_sm90_rows.cuh"
#include "attention/softmax.cuh"

namespace fastattn {
namespace {

constexpr int kThreads = 256;

template <int HEAD_DIM>
struct Tile {
  static constexpr int kBlockM = flash_bwd_sm90_tile(HEAD_DIM).block_m;
};

// What a CTA of either kernel is about: a block of rows of one head. Heads go fastest, since they lie side by side, and
// the last sequence comes first: the main kernel begins with the first ones, and so does each kernel with what the one
// before left in the L2 cache.
struct RowBlock {
  int32_t seq_idx, block, head_idx;
};

__device__ __forceinline__ RowBlock row_block(const FlashBwdSm90Params& p, int32_t num_seqs) {
  const int32_t blocks_of_seq = static_cast<int32_t>(p.config.blocks_of_seq);
  const int32_t of_all = blockIdx.x / p.num_heads, from_end = of_all / blocks_of_seq;
  return {num_seqs - 1 - from_end, of_all - from_end * blocks_of_seq,
          static_cast<int32_t>(blockIdx.x - of_all * p.num_heads)};
}

// Of a block of rows of one head: delta, the LSE in base 2, and zeros for the sums of dQ. A CTA for each block.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const FlashBwdSm90Params p) {
  constexpr int BLOCK_M = Tile<HEAD_DIM>::kBlockM;
  constexpr int CHUNKS = HEAD_DIM % 3 == 0 ? 3 : 1;  // of eight elements, that a lane has
  constexpr int LANES = HEAD_DIM / 8 / CHUNKS;       // of a row
  static_assert(32 % LANES == 0 && BLOCK_M % (kThreads / LANES) == 0);
  grid_dependency_launch();
  const auto [seq_idx, block, head_idx] = row_block(p, p.num_seqs);
  if (threadIdx.x == 0 && blockIdx.x == 0) *p.tile_counter = 0;

  const SequenceRows rows = query_rows(p, seq_idx, BLOCK_M);
  if (block * BLOCK_M >= rows.len) return;
  const int64_t workspace_block = head_idx * p.config.blocks_of_head + rows.first_block + block;
  if (p.turns != nullptr && threadIdx.x < 2) p.turns[workspace_block * 2 + threadIdx.x] = 0;

  float4* const sums = reinterpret_cast<float4*>(p.dq_sum + workspace_block * BLOCK_M * HEAD_DIM);
#pragma unroll
  for (int i = 0; i < BLOCK_M * HEAD_DIM / 4 / kThreads; ++i) {
    sums[i * kThreads + threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }

  const bool packed = p.cu_seqlens_q != nullptr;
  const int lane = threadIdx.x % LANES;
  const T* const out =
      static_cast<const T*>(p.out) + (packed ? 0 : seq_idx * p.out_batch_stride) + head_idx * p.out_head_stride;
  const T* const dout =
      static_cast<const T*>(p.dout) + (packed ? 0 : seq_idx * p.dout_batch_stride) + head_idx * p.dout_head_stride;
  const int64_t lse_start = packed ? head_idx * p.q_tokens : (seq_idx * p.num_heads + head_idx) * p.q_tokens;
#pragma unroll
  for (int i = 0; i < BLOCK_M; i += kThreads / LANES) {
    const int row_of_block = i + threadIdx.x / LANES;
    const int32_t row = block * BLOCK_M + row_of_block;
    const bool valid = row < rows.len;
    const int64_t token = rows.start + row;
    float delta = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int column = (chunk * LANES + lane) * 8;
      if (!valid || column >= p.v_head_dim) continue;
      const uint4 o = __ldcs(reinterpret_cast<const uint4*>(out + token * p.out_token_stride + column));
      const uint4 d = *reinterpret_cast<const uint4*>(dout + token * p.dout_token_stride + column);
      const uint32_t out_pairs[4] = {o.x, o.y, o.z, o.w}, dout_pairs[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 a = unpack_pair<T>(out_pairs[j]), b = unpack_pair<T>(dout_pairs[j]);
        delta = fmaf(a.y, b.y, fmaf(a.x, b.x, delta));
      }
    }
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, offset);
    if (lane == 0) {
      float lse = INFINITY;  // so that exp(s - lse) is 0, as for rows that see no key
      if (valid) {
        const float given = p.lse[lse_start + token];
        if (!isinf(given)) lse = given * kLog2E;
        if (p.dlse != nullptr) delta -= p.dlse[lse_start + token];
      }
      p.lse_log2[workspace_block * BLOCK_M + row_of_block] = lse;
      p.delta[workspace_block * BLOCK_M + row_of_block] = isinf(lse) ? 0.0f : delta;
    }
  }
}

// The sums of dQ, which lie as flash_bwd_sm90.cuh's accumulators do, as rows: scaled and rounded. A CTA for each block
// of rows; those of one more sequence than there is clear what keys behind the last sequence have for gradients.
template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(kThreads) finish_kernel(const FlashBwdSm90Params p) {
  constexpr int BLOCK_M = Tile<HEAD_DIM>::kBlockM;
  constexpr int COLUMNS = HEAD_DIM / 2;  // of a group of 128 threads
  const auto [seq_idx, block, head_idx] = row_block(p, p.num_seqs + (p.cu_seqlens_k != nullptr));
  grid_dependency_wait();
  if (seq_idx == p.num_seqs) {
    const int64_t begin = p.cu_seqlens_k[p.num_seqs];
    const int64_t first = (static_cast<int64_t>(block) * p.num_heads + head_idx) * kThreads + threadIdx.x;
    const int64_t num_threads = p.config.blocks_of_seq * p.num_heads * kThreads;
    const auto clear = [&](void* gradient, int32_t head_dim) {
      uint4* const chunks = static_cast<uint4*>(gradient);
      const int64_t chunks_of_token = static_cast<int64_t>(p.num_kv_heads) * head_dim / 8;
      for (int64_t i = begin * chunks_of_token + first; i < p.k_tokens * chunks_of_token; i += num_threads) {
        chunks[i] = make_uint4(0, 0, 0, 0);
      }
    };
    clear(p.dk, p.head_dim);
    clear(p.dv, p.v_head_dim);
    return;
  }

  const SequenceRows rows = query_rows(p, seq_idx, BLOCK_M);
  if (block * BLOCK_M >= rows.allocated) return;
  const int64_t workspace_block = head_idx * p.config.blocks_of_head + rows.first_block + block;
  const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int first_row = warp * 16 + lane / 4;
  const float4* const sums =
      reinterpret_cast<const float4*>(p.dq_sum + (workspace_block * 2 + group) * (BLOCK_M * HEAD_DIM / 2)) +
      threadIdx.x % 128;
  const bool any = block * BLOCK_M < rows.len;
  const int64_t first_token = (p.cu_seqlens_q != nullptr ? 0 : seq_idx * p.q_tokens) + rows.start + block * BLOCK_M;
#pragma unroll
  for (int t = 0; t < COLUMNS / 8; t += 4) {
    float4 sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[i] = any && t + i < COLUMNS / 8 ? __ldcs(sums + (t + i) * 128) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = pack_pair<T>((r ? sum[i].z : sum[i].x) * p.softmax_scale, (r ? sum[i].w : sum[i].y) * p.softmax_scale);
      }
      gather_columns(w, lane);
      const int32_t row = first_row + 8 * r;
      const int own_column = (t + lane % 4) * 8, column = flash_bwd_sm90_column(HEAD_DIM, group, own_column);
      if (block * BLOCK_M + row >= rows.len) w[0] = w[1] = w[2] = w[3] = 0;
      if (block * BLOCK_M + row < rows.allocated && own_column < COLUMNS && column < p.head_dim) {
        T* const dq = static_cast<T*>(p.dq) + ((first_token + row) * p.num_heads + head_idx) * p.head_dim + column;
        __stcs(reinterpret_cast<uint4*>(dq), make_uint4(w[0], w[1], w[2], w[3]));
      }
    }
  }
}

template <typename T, int HEAD_DIM>
cudaError_t launch(const FlashBwdSm90Params& p, cudaStream_t stream) {
  const int64_t ctas_of_seq = p.config.blocks_of_seq * p.num_heads;
  const int64_t seqs_behind = p.cu_seqlens_k != nullptr;
  if (ctas_of_seq * (p.num_seqs + seqs_behind) > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaError_t error = launch_kernel(prepare_kernel<T, HEAD_DIM>, ctas_of_seq * p.num_seqs, kThreads, 0, stream, p);
  if (error != cudaSuccess) return error;
  error = launch_flash_bwd_sm90<T, HEAD_DIM>(p, stream);
  if (error != cudaSuccess) return error;
  const int64_t num_ctas = ctas_of_seq * (p.num_seqs + seqs_behind);
  return launch_kernel_behind(finish_kernel<T, HEAD_DIM>, num_ctas, kThreads, 0, stream, p);
}

struct Instantiation {
  DType dtype;
  int head_dim;
  cudaError_t (*launch)(const FlashBwdSm90Params&, cudaStream_t);
};

// Which exist: add a line here and its instantiation in flash_bwd_sm90_hd*.cu.
constexpr Instantiation kInstantiations[] = {
    {DType::kBFloat16, 64, launch<__nv_bfloat16, 64>},   {DType::kFloat16, 64, launch<__half, 64>},
    {DType::kBFloat16, 96, launch<__nv_bfloat16, 96>},   {DType::kFloat16, 96, launch<__half, 96>},
    {DType::kBFloat16, 128, launch<__nv_bfloat16, 128>}, {DType::kFloat16, 128, launch<__half, 128>},
    {DType::kBFloat16, 192, launch<__nv_bfloat16, 192>}, {DType::kFloat16, 192, launch<__half, 192>},
    {DType::kBFloat16, 256, launch<__nv_bfloat16, 256>}, {DType::kFloat16, 256, launch<__half, 256>},
};

}  // namespace

cudaError_t flash_bwd_sm90(const FlashBwdSm90Params& params, cudaStream_t stream) {
  for (const Instantiation& entry : kInstantiations) {
    if (entry.dtype == params.dtype && entry.head_dim == params.config.head_dim) return entry.launch(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastattn
