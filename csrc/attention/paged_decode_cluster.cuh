// The decode kernel (paged_decode.cuh) where sequences are so few and short that accesses that wait for each other take
// as long as their bytes: a sequence's column is a cluster's, whose CTAs add up through their shared memory.
//
//     cluster   │ CTA 0         │ CTA 1         │ …   of one KV head, 16 of its rows, and one sequence
//     warp 0    │ keys    0- 15 │ keys   16- 31 │     and so on around the cluster, so that whatever the length is, all
//     warp 1    │ keys  128-143 │ keys  144-159 │     have equal numbers of them, and each warp knows the first of its
//     …                                               own before it knows the length: the page of these is asked for
//                                                     together with it, and they in L2 when it is there
//
// A warp's keys go through its ring as in paged_decode.cuh. Warps are merged in each CTA, CTAs in the cluster, in
// order: of each result a CTA adds up a share. So two runs are bitwise equal, and nothing depends on the other
// sequences but how many there are.
#pragma once

#include "arch/cluster.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/mbarrier.cuh"
#include "attention/paged_decode_warp.cuh"

namespace fastattn {

// Behind it the stages of each warp's ring, and DecodeRowSums of each warp.
template <typename T, typename KV, int HEAD_DIM>
struct alignas(128) DecodeClusterStorage {
  using Stage = typename PagedDecodeRing<KV, HEAD_DIM>::Stage;
  static constexpr int kStages = paged_decode_cluster_stages(HEAD_DIM, sizeof(KV) == 1);
  static constexpr size_t kWarpBytes = kStages * sizeof(Stage) + sizeof(DecodeRowSums);

  // What the cluster's CTAs have found for this one's share of the rows, one after the other: as much as all rows are.
  struct Inbox {
    static constexpr int kGroups = kPagedDecodeRows * HEAD_DIM / 4;
    float4 outs[kGroups];
    float2 sums[kGroups];  // the reference of exponentials, and the sum
  };

  Inbox inbox;
  MBarrier inbox_full;
  alignas(16) T q[kPagedDecodeRows][HEAD_DIM + 8];  // rows begin in different banks
};

template <typename T, typename KV, int HEAD_DIM>
__global__ void __launch_bounds__(PagedDecodeRing<KV, HEAD_DIM>::kMaxThreads, 1)
    paged_decode_cluster_kernel(const __grid_constant__ PagedDecodeParams p, const ScoreScale score_scale) {
  using Storage = DecodeClusterStorage<T, KV, HEAD_DIM>;
  using Ring = PagedDecodeRing<KV, HEAD_DIM>;
  using Mask = AttentionMask;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return __trap();  // never launched, and never silent
#else
  constexpr int KEYS = Ring::kKeys, STAGES = Storage::kStages;
  constexpr int GROUPS = HEAD_DIM / 4;  // of four dims, which one thread takes when results are added up
  Storage& smem = shared_storage_of_128<Storage>();
  const int32_t rank = static_cast<int32_t>(cluster_rank()), cluster_log2 = p.config.cluster_log2;
  const int num_warps = p.config.num_warps, num_threads = 32 * num_warps;
  const int warp_idx = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* const all_stages = reinterpret_cast<typename Ring::Stage*>(&smem + 1);
  auto* const warp_sums = reinterpret_cast<DecodeRowSums*>(all_stages + num_warps * STAGES);
  const int32_t column_of_all = static_cast<int32_t>(blockIdx.x) >> cluster_log2;
  const int32_t seq_idx = p.num_columns_div.divide(column_of_all);
  const DecodeColumn column(p, column_of_all - seq_idx * p.num_columns_div.divisor);
  grid_dependency_wait();

  // ---- lengths, and at the same time the page of the warp's first keys, if none is masked before them. These come to
  // L2 while the range of keys is made of the lengths, which takes 0.8 us where the code comes from memory.
  const int32_t first_offset = ((warp_idx << cluster_log2) + rank) * KEYS;
  const int32_t step_keys = (num_warps << cluster_log2) * KEYS;
  const int32_t* const block_table = p.block_table + seq_idx * p.block_table_stride;
  const DecodeRows<KV, HEAD_DIM> rows = {p, column.kv_head_idx, true};
  int32_t key = first_offset + lane % KEYS, page = seq_idx, first_token = 0;
  if (p.paged) {
    const int32_t block = p.block_size_div.divide(key);
    page = -1;
    if (block < p.max_blocks) page = load_early(block_table + block);
    // Where a tile has 32 keys, asking for them twice takes longer than it saves; of 8 bits registers are short.
    if constexpr (KEYS == 16 && !Ring::k8Bit) {
      if (page >= 0 && page < p.num_blocks) rows.prefetch(page, p.block_size_div.remainder(key));
    }
  } else if (p.cu_seqlens_k != nullptr) {
    first_token = p.cu_seqlens_k[seq_idx];
  }
  const DecodeSequence<Mask> sequence(p, seq_idx, column.first_row);
  const KeyRange visible = sequence.visible;
  int32_t first_key = visible.begin / KEYS * KEYS + first_offset;
  const auto find_page = [&] {
    if (p.paged && key < visible.end) page = block_table[p.block_size_div.divide(key)];
  };
  if (first_key != first_offset) {
    key = first_key + lane % KEYS;
    find_page();
  }

  const auto load = [&](typename Ring::Stage& stage) {
    if (key - lane % KEYS >= visible.end) return;
    bool exists = key >= visible.begin && key < visible.end;
    int32_t token = first_token + key;
    if (p.paged) {
      exists = exists && page >= 0 && page < p.num_blocks;
      token = p.block_size_div.remainder(key);
    }
    rows.load(stage, exists, page, token);
    key += step_keys;
    find_page();
  };
  const auto load_q = [&] {
    constexpr int CHUNKS = HEAD_DIM / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < sequence.num_rows * CHUNKS; i += num_threads) {
      const int32_t row = column.first_row + i / CHUNKS, chunk = i % CHUNKS;
      const T* const source = static_cast<const T*>(p.q) + seq_idx * p.q_batch_stride +
                              (sequence.q_start + p.group_size.divide(row)) * p.q_token_stride +
                              column.head(p, row) * p.q_head_stride;
      if (chunk * 8 < p.head_dim) cp_async_16(&smem.q[i / CHUNKS][chunk * 8], source + chunk * 8, true);
    }
  };
  // The groups of four dims of all rows, numbered through, are dealt to the CTAs four by four.
  const auto groups_of = [&](int32_t num_rows, int32_t of_rank) {
    return ((num_rows * GROUPS / 4 - of_rank + (1 << cluster_log2) - 1) >> cluster_log2) * 4;
  };
  const int pitch = groups_of(sequence.num_rows, 0);  // of what one CTA says in another's inbox
  static_assert(GROUPS % 4 == 0);

  if (threadIdx.x == 0) {
    smem.inbox_full.init(1);
    fence_barrier_init();
    smem.inbox_full.arrive_expect_bytes((groups_of(sequence.num_rows, rank) << cluster_log2) *
                                        (sizeof(float4) + sizeof(float2)));
  }

  // ---- tiles
  auto* const stages = all_stages + warp_idx * STAGES;
  DecodeProducts<T, KV, HEAD_DIM> products;
  products.begin(p);
  int stage = 0, ahead = STAGES - 1;  // tiles to be asked for before the first is waited for
#pragma unroll 1
  while (ahead > 0 || first_key < visible.end) {
    if (ahead == 0) {
      cp_async_wait<STAGES - 2>();
      __syncwarp();  // the other lanes' copies are here, and all are done with the stage that is loaded next
    }
    load(stages[stage]);
    if (ahead == STAGES - 1) load_q();
    cp_async_commit();
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    if (ahead > 0) {
      if (--ahead > 0) continue;
      cluster_meet();  // all inboxes have their barriers
      cp_async_wait<STAGES - 2>();
      __syncthreads();  // Q has come
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = half * 8 + lane / 4;
        products.load_q(p, half, smem.q[row], row < sequence.num_rows, column.kv_head_idx);
      }
      products.load_value_scale(p, column.kv_head_idx);
      continue;
    }
    products.add(p, score_scale, column, sequence, seq_idx, first_key, stages[stage]);
    first_key += step_keys;
  }

  // ---- the warps' results, added up, go to the CTAs that have them to add
  products.finish(p, score_scale, sequence.num_rows, stages[0], warp_sums[warp_idx]);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < sequence.num_rows * GROUPS; i += num_threads) {
    DecodePartial partial;
#pragma unroll 1
    for (int w = 0; w < num_warps; w += 4) {
      float2 sums[4];
      float4 outs[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int from = min(w + j, num_warps - 1);
        const DecodeRowSums& of_warp = warp_sums[from];
        const int row = i / GROUPS;
        sums[j] = make_float2(w + j < num_warps ? of_warp.row_max[row] : -INFINITY, of_warp.row_sum[row]);
        outs[j] = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(all_stages + from * STAGES) +
                                                   out_offset<HEAD_DIM>(row, i % GROUPS));
      }
      partial.add(sums, outs);
    }
    const int owner = i / 4 & ((1 << cluster_log2) - 1);
    const int slot = rank * pitch + (i / 4 >> cluster_log2) * 4 + i % 4;
    smem.inbox_full.store_at_cta(owner, &smem.inbox.outs[slot],
                                 make_float4(partial.sums[0], partial.sums[1], partial.sums[2], partial.sums[3]));
    smem.inbox_full.store_at_cta(owner, &smem.inbox.sums[slot], make_float2(partial.row_max, partial.row_sum));
  }
  smem.inbox_full.wait(0);
  const DecodeOutput<T, Mask> output(p, column, sequence, seq_idx);
#pragma unroll 1
  for (int i = threadIdx.x; i < groups_of(sequence.all_rows, rank); i += num_threads) {
    const int group_of_all = ((i / 4 << cluster_log2) + rank) * 4 + i % 4;
    const int32_t row = group_of_all / GROUPS, group = group_of_all % GROUPS;
    DecodePartial partial;
    if (row < sequence.num_rows) {
      constexpr int BATCH = 8;
#pragma unroll 1
      for (int from = 0; from < 1 << cluster_log2; from += BATCH) {
        float2 sums[BATCH];
        float4 outs[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
          const int slot = min(from + j, (1 << cluster_log2) - 1) * pitch + i;
          sums[j] = smem.inbox.sums[slot];
          outs[j] = smem.inbox.outs[slot];
          if (from + j >= 1 << cluster_log2) sums[j].x = -INFINITY;
        }
        partial.add(sums, outs);
      }
    }
    if (group * 4 < p.v_head_dim) output.store(row, group, partial);
  }
#endif
}

template <typename T, typename KV, int HEAD_DIM>
cudaError_t launch_paged_decode_cluster(const PagedDecodeParams& p, cudaStream_t stream) {
  using Storage = DecodeClusterStorage<T, KV, HEAD_DIM>;
  static_assert(sizeof(Storage) + paged_decode_max_warps(HEAD_DIM) * Storage::kWarpBytes <= 227 << 10);
  const auto smem_bytes = static_cast<int>(sizeof(Storage) + p.config.num_warps * Storage::kWarpBytes);
  return launch_clusters(paged_decode_cluster_kernel<T, KV, HEAD_DIM>, p.config.num_ctas, 1 << p.config.cluster_log2,
                         32 * p.config.num_warps, smem_bytes, stream, p, ScoreScale::make(p.softmax_scale, p.softcap));
}

}  // namespace fastattn
