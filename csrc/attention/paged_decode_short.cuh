// The decode kernel of clusters (paged_decode_cluster.cuh) where all is short: up to 8 rows a KV head, few keys, in
// pages of a multiple of 16, of which the plain causal mask or none hides some.
//
//     cluster   │ CTA 0         │ CTA 1         │ …   of one KV head of one sequence: keys are dealt 16 at a time,
//     warp 0    │ keys    0- 15 │ keys   16- 31 │     which are of one page each, that is asked for at the same time
//     warp 1    │ keys  128-143 │ keys  144-159 │     as the lengths
//
// There, what takes the time is a chain of loads that wait for each other, and the code, which comes out of memory as
// the keys do. So there is little of it, in one line:
//
//   Loads     K, V and Q go to the registers that the tensor cores take them from; there is no ring. A lane has 16
//             neighbouring bytes of a row, so which dims make a fragment's k (of Q K^T) or row (of V^T P^T) is not in
//             order, but the same for both operands.
//   Products  S^T = K Q^T and O^T = V^T P^T: 16 keys, or dims, by 8 rows, so that half of the fragments are not empty.
//   Sums      The same code adds up the warps of a CTA, pair by pair of dims, and then the CTAs of the cluster.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "arch/cache_policy.cuh"
#include "arch/cluster.cuh"
#include "arch/e4m3.cuh"
#include "arch/global_memory.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/mbarrier.cuh"
#include "arch/mma_sm80.cuh"
#include "arch/pair.cuh"
#include "arch/recompute.cuh"
#include "attention/paged_decode.h"
#include "attention/softmax.cuh"

namespace fastattn {

// What the kernel needs of PagedDecodeParams, in two lines of memory: each is waited for before the first instruction
// that needs it.
struct PagedDecodeShortParams {
  const void *q, *k, *v;
  const int32_t *cu_seqlens_q, *seqused_k, *block_table;
  void* out;
  float* lse;
  const float* out_scale;  // nullptr, or out is e4m3
  int64_t num_tokens;
  int32_t block_table_stride, max_blocks, num_blocks;
  int32_t num_rows;  // of a KV head, at most
  int32_t q_token_stride, q_head_stride;
  int32_t k_block_stride, k_token_stride, k_head_stride;
  int32_t v_block_stride, v_token_stride, v_head_stride;
  int32_t num_heads;
  FastDivide num_kv_heads, group_size, block_size;
  float scale;  // of scores in base 2
  bool causal;
  int8_t cluster_log2;
};

// Behind it, the rows of each warp.
template <int HEAD_DIM>
struct alignas(128) PagedDecodeShortStorage {
  static constexpr int kPairs = HEAD_DIM / 2;  // of dims
  static constexpr int kPitch = HEAD_DIM + 4;  // of rows, in floats

  // A pair of dims, the reference of its row's exponentials, and their sum: as each CTA of the cluster has found them.
  float4 inbox[kPagedDecodeShortRows * kPairs];
  float2 sums[kPagedDecodeShortWarps][kPagedDecodeShortRows];  // of each warp
  MBarrier inbox_full;
};

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(32 * kPagedDecodeShortWarps, HEAD_DIM <= 64 ? 2 : 1)
    paged_decode_short_kernel(const __grid_constant__ PagedDecodeShortParams p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return __trap();  // never launched, and never silent
#else
  using Storage = PagedDecodeShortStorage<HEAD_DIM>;
  constexpr int WARPS = kPagedDecodeShortWarps, PAIRS = Storage::kPairs, PITCH = Storage::kPitch;
  constexpr int K_CHUNKS = HEAD_DIM / 32, V_CHUNKS = HEAD_DIM / 64, TILES = HEAD_DIM / 16;  // chunks of a lane's, of 8
  constexpr bool WHOLE_ROWS = HEAD_DIM * sizeof(T) == 256;
  Storage& smem = shared_storage_of_128<Storage>();
  auto* const warp_rows = reinterpret_cast<float*>(&smem + 1);
  const int warp_idx = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int32_t rank = static_cast<int32_t>(cluster_rank()), num_ctas = 1 << p.cluster_log2;
  const int32_t column = static_cast<int32_t>(blockIdx.x) >> p.cluster_log2, seq_idx = p.num_kv_heads.divide(column);
  const int32_t kv_head_idx = column - seq_idx * p.num_kv_heads.divisor, group = p.group_size.divisor;
  grid_dependency_wait();

  // ---- lengths, and the page of the warp's first keys
  int32_t first_key = ((warp_idx << p.cluster_log2) + rank) * 16;
  const int32_t step_keys = 16 * WARPS << p.cluster_log2;
  const int32_t* const block_table = p.block_table + static_cast<int64_t>(seq_idx) * p.block_table_stride;
  int32_t block = p.block_size.divide(first_key), page = -1;
  if (block < p.max_blocks) page = load_early(block_table + block);
  const int32_t q_start = load_early(p.cu_seqlens_q + seq_idx);
  const int32_t q_end = load_early(p.cu_seqlens_q + seq_idx + 1);
  const int32_t used_k = load_early(p.seqused_k + seq_idx);

  // Meanwhile: the groups of eight pairs, numbered through, are dealt to the CTAs of the cluster one by one.
  const auto pairs_of = [&](int32_t of_rank) {
    return ((p.num_rows * PAIRS / 8 - of_rank + num_ctas - 1) >> p.cluster_log2) * 8;
  };
  if (threadIdx.x == 0) {
    smem.inbox_full.init(1);
    fence_barrier_init();
    smem.inbox_full.arrive_expect_bytes((pairs_of(rank) << p.cluster_log2) * sizeof(float4));
  }
  cluster_arrive();
  const T* const k = static_cast<const T*>(p.k) + (kv_head_idx * p.k_head_stride + t * 8);
  const T* const v = static_cast<const T*>(p.v) + (kv_head_idx * p.v_head_stride + g * 8);
  const int32_t q_token = p.group_size.divide(g);
  const T* const q = static_cast<const T*>(p.q) + (static_cast<int64_t>(q_token) * p.q_token_stride + t * 8 +
                                                   (kv_head_idx * group + g - q_token * group) * p.q_head_stride);
  const uint64_t policy = evict_first_policy();
  uint4 q_rows[K_CHUNKS];
  float acc[TILES][4] = {};
  float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.0f, 0.0f};

  // Where a lane's rows of the tile lie in their page: keys g and g + 8, values 2t, 2t + 1, 2t + 8 and 2t + 9; behind
  // the last one, it again, so that all that is read is there.
  int32_t k_offsets[2], v_offsets[4];
  const auto place_rows = [&](int32_t last) {
    const int32_t token = first_key - block * p.block_size.divisor;
#pragma unroll
    for (int i = 0; i < 2; ++i) k_offsets[i] = computed_once((token + min(g + i * 8, last)) * p.k_token_stride);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v_offsets[i] = computed_once((token + min(2 * t + i % 2 + i / 2 * 8, last)) * p.v_token_stride);
    }
  };
  place_rows(15);

  const int32_t q_len = q_end - q_start;
  const int32_t num_rows = min(max(q_len, 0) * group, p.num_rows);
  const int32_t k_len = num_rows > 0 ? max(min(used_k, p.max_blocks * p.block_size.divisor), 0) : 0;
#pragma unroll
  for (int i = 0; i < K_CHUNKS; ++i) {
    q_rows[i] =
        load_if(g < num_rows, q + static_cast<int64_t>(q_start) * p.q_token_stride + i * 32, policy, WHOLE_ROWS);
  }

  // ---- tiles of 16 keys: one, for most
  bool is_first = true;
#pragma unroll 1
  while (true) {
    const bool exists = first_key < k_len && static_cast<uint32_t>(page) < static_cast<uint32_t>(p.num_blocks);
    if (__builtin_expect(first_key + 16 > k_len, 0)) place_rows(k_len - 1 - first_key);
    const T* const page_k = k + static_cast<int64_t>(page) * p.k_block_stride;
    const T* const page_v = v + static_cast<int64_t>(page) * p.v_block_stride;
    uint4 k_rows[2][K_CHUNKS], v_rows[4][V_CHUNKS];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* const row = page_k + k_offsets[half];
#pragma unroll
      for (int i = 0; i < K_CHUNKS; ++i) k_rows[half][i] = load_if(exists, row + i * 32, policy, WHOLE_ROWS);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T* const row = page_v + v_offsets[j];
#pragma unroll
      for (int i = 0; i < V_CHUNKS; ++i) v_rows[j][i] = load_if(exists, row + i * 64, policy, WHOLE_ROWS);
    }
    if (__builtin_expect(!exists, 0)) {
#pragma unroll
      for (int i = 0; i < 2 * K_CHUNKS; ++i) clear(k_rows[i % 2][i / 2]);
#pragma unroll
      for (int i = 0; i < 4 * V_CHUNKS; ++i) clear(v_rows[i % 4][i / 4]);
    }
    const int32_t next_key = first_key + step_keys;
    if (next_key < k_len) {
      block = p.block_size.divide(next_key);
      page = load_early(block_table + block);
    }
    if (is_first) cluster_wait();  // all inboxes have their barriers

    float scores[4] = {}, odd_scores[4] = {};  // of keys g and g + 8, rows 2t and 2t + 1
#pragma unroll
    for (int i = 0; i < K_CHUNKS; ++i) {
      const uint4 &low = k_rows[0][i], &high = k_rows[1][i];
      mma_m16n8k16<T>(scores, {low.x, high.x, low.y, high.y}, q_rows[i].x, q_rows[i].y);
      mma_m16n8k16<T>(odd_scores, {low.z, high.z, low.w, high.w}, q_rows[i].z, q_rows[i].w);
    }
    float new_max[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t end = p.causal ? k_len - q_len + p.group_size.divide(2 * t + i) + 1 : k_len;
#pragma unroll
      for (int j = i; j < 4; j += 2) {
        const bool seen = first_key + g + j / 2 * 8 < min(end, k_len);
        scores[j] = seen ? (scores[j] + odd_scores[j]) * p.scale : -INFINITY;
      }
      new_max[i] = fmaxf(fmaxf(scores[i], scores[2 + i]), row_max[i]);
    }
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
      const float other[2] = {__shfl_xor_sync(0xffffffffu, new_max[0], distance),
                              __shfl_xor_sync(0xffffffffu, new_max[1], distance)};
      new_max[0] = fmaxf(new_max[0], other[0]);
      new_max[1] = fmaxf(new_max[1], other[1]);
    }
    if (__builtin_expect(!is_first, 0)) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float correction = exp2_approx(row_max[i] - finite_max(new_max[i]));
        row_sum[i] *= correction;
#pragma unroll
        for (int j = 0; j < 2 * TILES; ++j) acc[j / 2][j % 2 * 2 + i] *= correction;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = exp2_approx(scores[i] - finite_max(new_max[i % 2]));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      row_max[i] = new_max[i];
      row_sum[i] += scores[i] + scores[2 + i];  // the lane's own share
    }
    const uint32_t p_low = transpose_matrix(pack_pair<T>(scores[0], scores[1]));
    const uint32_t p_high = transpose_matrix(pack_pair<T>(scores[2], scores[3]));
#pragma unroll
    for (int i = 0; i < TILES; ++i) {  // rows g and g + 8 of a tile: dims i and i + TILES of a lane's
      const auto keys_of = [&](int j, int dim) {
        const auto word = [&](const uint4& row) {
          return dim % 8 / 2 == 0 ? row.x : dim % 8 / 2 == 1 ? row.y : dim % 8 / 2 == 2 ? row.z : row.w;
        };
        return __byte_perm(word(v_rows[j][dim / 8]), word(v_rows[j + 1][dim / 8]), dim % 2 == 0 ? 0x5410 : 0x7632);
      };
      mma_m16n8k16<T>(acc[i], {keys_of(0, i), keys_of(0, i + TILES), keys_of(2, i), keys_of(2, i + TILES)}, p_low,
                      p_high);
    }
    first_key = next_key;
    is_first = false;
    if (first_key >= k_len) break;
    place_rows(15);
  }
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) {
    row_sum[0] += __shfl_xor_sync(0xffffffffu, row_sum[0], distance);
    row_sum[1] += __shfl_xor_sync(0xffffffffu, row_sum[1], distance);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + i;
    if (row >= p.num_rows) continue;
    if (g == 0) smem.sums[warp_idx][row] = make_float2(row_max[i], row_sum[i]);
    float* const target = warp_rows + (warp_idx * p.num_rows + row) * PITCH + g * 8;
#pragma unroll
    for (int dim = 0; dim < HEAD_DIM / 8; dim += 4) {
      const auto value = [&](int j) { return acc[(dim + j) % TILES][(dim + j) / TILES * 2 + i]; };
      *reinterpret_cast<float4*>(target + dim / 8 * 64 + dim % 8) = make_float4(value(0), value(1), value(2), value(3));
    }
  }

  // ---- the warps' results added up, each pair at the CTA that has it to add; and then the CTAs' of its own pairs
#pragma unroll 1
  for (int stage = 0; stage < 2; ++stage) {
    const bool of_warps = stage == 0;
    if (of_warps) {
      __syncthreads();
    } else {
      smem.inbox_full.wait(0);
    }
    const int num_parts = of_warps ? WARPS : num_ctas, pitch = pairs_of(0);  // of what one CTA says in an inbox
    const int num_pairs = of_warps ? p.num_rows * PAIRS : pairs_of(rank);
#pragma unroll 1
    for (int i = threadIdx.x; i < num_pairs; i += 32 * WARPS) {
      const int pair_of_all = of_warps ? i : ((i / 8 << p.cluster_log2) + rank) * 8 + i % 8;
      const int row = pair_of_all / PAIRS, pair = pair_of_all % PAIRS;
      const float* outs = of_warps ? warp_rows + row * PITCH + pair * 2 : &smem.inbox[i].x;
      const float* sums = of_warps ? &smem.sums[0][row].x : &smem.inbox[i].z;
      const int next_outs = of_warps ? p.num_rows * PITCH : 4 * pitch;
      const int next_sums = of_warps ? 2 * kPagedDecodeShortRows : 4 * pitch;
      constexpr int MOST = 8;
      static_assert(WARPS == MOST && 1 << kPagedDecodeMostClusterLog2 == MOST);
      float2 out_of[MOST], sums_of[MOST];
#pragma unroll
      for (int j = 0; j < MOST; ++j) {
        const int part = min(j, num_parts - 1);
        out_of[j] = *reinterpret_cast<const float2*>(outs + part * next_outs);
        sums_of[j] = *reinterpret_cast<const float2*>(sums + part * next_sums);
        if (j >= num_parts) sums_of[j].x = -INFINITY;
      }
      float largest = sums_of[0].x, sum = 0.0f;
      float2 out = {0.0f, 0.0f};
#pragma unroll
      for (int j = 1; j < MOST; ++j) largest = fmaxf(largest, sums_of[j].x);
#pragma unroll
      for (int j = 0; j < MOST; ++j) {
        const float weight = exp2_approx(sums_of[j].x - finite_max(largest));
        sum += weight * sums_of[j].y;
        out.x += weight * out_of[j].x;
        out.y += weight * out_of[j].y;
      }
      if (of_warps) {
        const int owner = i / 8 & (num_ctas - 1), slot = rank * pitch + (i / 8 >> p.cluster_log2) * 8 + i % 8;
        smem.inbox_full.store_at_cta(owner, &smem.inbox[slot], make_float4(out.x, out.y, largest, sum));
      } else if (row < num_rows) {
        const int32_t token = p.group_size.divide(row), head = kv_head_idx * group + row - token * group;
        const float inverse = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
        const int64_t element = (static_cast<int64_t>(q_start + token) * p.num_heads + head) * HEAD_DIM + pair * 2;
        if (__builtin_expect(p.out_scale != nullptr, 0)) {
          const float in_e4m3 = __fdividef(inverse, *p.out_scale);
          *reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(p.out) + element) =
              static_cast<uint16_t>(pack_e4m3(out.x * in_e4m3, out.y * in_e4m3));
        } else {
          *reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + element) =
              pack_pair<T>(out.x * inverse, out.y * inverse);
        }
        if (pair == 0) p.lse[head * p.num_tokens + q_start + token] = log_sum_exp(largest, sum);
      }
    }
  }
#endif
}

// Whether it takes a call that is a cluster's. With more than four tiles a warp, where sequences are as long as they
// can be, the ring is faster by more than 3 %.
inline bool paged_decode_short_fits(const PagedDecodeParams& p) {
  const auto fit = [](std::initializer_list<int64_t> offsets) {
    return std::all_of(offsets.begin(), offsets.end(), [](int64_t offset) { return offset <= INT32_MAX; });
  };
  const int64_t most_keys = int64_t{4 * 16 * kPagedDecodeShortWarps} << p.config.cluster_log2;
  const bool plain = p.softcap == 0.0f && p.alibi_slopes == nullptr && p.sinks == nullptr && p.seqused_q == nullptr &&
                     p.window_left < 0 && p.window_right <= 0 && p.max_q_len == INT32_MAX;
  return plain && p.paged && int64_t{p.max_blocks} * p.block_size <= most_keys && p.block_size % 16 == 0 &&
         p.cu_seqlens_q != nullptr && p.seqused_k != nullptr && p.config.rows_of_slot <= kPagedDecodeShortRows &&
         p.head_dim == p.config.head_dim && p.v_head_dim == p.head_dim &&
         fit({p.block_table_stride, p.q_token_stride, p.num_heads * p.q_head_stride, p.k_block_stride,
              p.block_size * p.k_token_stride, p.num_kv_heads * p.k_head_stride, p.v_block_stride,
              p.block_size * p.v_token_stride, p.num_kv_heads * p.v_head_stride});
}

template <typename T, int HEAD_DIM>
cudaError_t launch_paged_decode_short(const PagedDecodeParams& p, cudaStream_t stream) {
  PagedDecodeShortParams own;
  own.q = p.q;
  own.k = p.k;
  own.v = p.v;
  own.cu_seqlens_q = p.cu_seqlens_q;
  own.seqused_k = p.seqused_k;
  own.block_table = p.block_table;
  own.out = p.out;
  own.lse = p.lse;
  own.out_scale = p.out_scale;
  own.num_tokens = p.num_tokens;
  own.block_table_stride = static_cast<int32_t>(p.block_table_stride);
  own.max_blocks = p.max_blocks;
  own.num_blocks = p.num_blocks;
  own.num_rows = p.config.rows_of_slot;
  own.q_token_stride = static_cast<int32_t>(p.q_token_stride);
  own.q_head_stride = static_cast<int32_t>(p.q_head_stride);
  own.k_block_stride = static_cast<int32_t>(p.k_block_stride);
  own.k_token_stride = static_cast<int32_t>(p.k_token_stride);
  own.k_head_stride = static_cast<int32_t>(p.k_head_stride);
  own.v_block_stride = static_cast<int32_t>(p.v_block_stride);
  own.v_token_stride = static_cast<int32_t>(p.v_token_stride);
  own.v_head_stride = static_cast<int32_t>(p.v_head_stride);
  own.num_heads = p.num_heads;
  own.num_kv_heads = p.num_kv_heads_div;
  own.group_size = p.group_size;
  own.block_size = p.block_size_div;
  own.scale = ScoreScale::make(p.softmax_scale, 0.0f).pre;
  own.causal = p.window_right == 0;
  own.cluster_log2 = static_cast<int8_t>(p.config.cluster_log2);
  const size_t smem_bytes = sizeof(PagedDecodeShortStorage<HEAD_DIM>) + kPagedDecodeShortWarps * p.config.rows_of_slot *
                                                                            PagedDecodeShortStorage<HEAD_DIM>::kPitch *
                                                                            sizeof(float);
  return launch_clusters(paged_decode_short_kernel<T, HEAD_DIM>, p.config.num_ctas, 1 << p.config.cluster_log2,
                         32 * kPagedDecodeShortWarps, static_cast<int>(smem_bytes), stream, own);
}

}  // namespace fastattn
