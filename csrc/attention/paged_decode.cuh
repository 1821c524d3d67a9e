// Attention of a few packed rows (query token, head of the group) a KV head, K and V in pages or contiguous: what
// decoding and the verification of drafts need. Bound by memory: what counts is how many bytes are in flight, how
// evenly the keys are dealt, and how long it takes until the first bytes are asked for and after the last ones came.
//
//   out[i, h, :] = sum_j p_ij v[j, h / G, :],  p_ij = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)
//   s_ij = softmax_scale * q[i, h, :] . k[j, h / G, :],  then softcap * tanh(s / softcap), ALiBi's bias, the mask
//   with sinks, lse_i is also over a logit sink[h], which has no value
//
//   q (T, H, D)   k (Tk, Hk, D)   v (Tk, Hk, Dv), or k, v in pages (num_blocks, block_size, Hk, D)   G = H / Hk
//   out (T, H, Dv)   lse (H, T) fp32   or all with a batch dimension in front
//   with out_scale, out is e4m3, of what it would be divided by that
//
//   k, v in pages may be of 8 bits (e4m3 or int8), times k_scale and v_scale of the KV head or of each of its tokens
//
// Plan: the visible keys of each sequence are cut into tiles (an empty one has a tile too), which are numbered sequence
// after sequence. A column is a KV head and 16 of its rows; its teams take the same number of neighbouring tiles each.
// Every warp finds them for itself from the lengths, so there is no launch before this one, and nothing that the host
// must know. Team t is of column t % num_columns, so that those that run side by side read the same pages.
//
//     sequences    │      0      │  1  │2│           3           │   4   │
//     tiles        │0 1 2 3 4 5 6│7 8 9│.│                       │       │
//     parts        └── 0 ──┴── 1 ──┴── 2 ──┴── 3 ──┴── 4 ──┴── 5 ──┴─ 6 ─┘
//
// A team is a CTA's warps. Beside prompts, which another kernel computes on the SMs that this one leaves (BESIDE), a
// CTA is large enough for one an SM and has two teams; and how many teams have parts, follows from the lengths too.
//
// A warp takes 16 keys of each tile, by itself: it loads them (cp.async) into a ring of its own, which runs ahead over
// the borders of sequences, and has a maximum, sum and O of its own. There is no barrier but at the end of a sequence:
//
//     warp 0   ═ tile 0 keys  0-15 ═╪═ tile 1 keys  0-15 ═╪═ …   ┐
//     warp 1   ═ tile 0 keys 16-31 ═╪═ tile 1 keys 16-31 ═╪═ …   │ merged in warp order where a sequence (or the team's
//     warp 2   ═ tile 0 keys 32-47 ═╪═ tile 1 keys 32-47 ═╪═ …   │ part of it) ends, through the stages consumed last
//     ...                                                        ┘
//
// A sequence that several parts share is finished by the team of the last one, when it has done all else: the others
// write what they have, and a mark, to the workspace; it waits for their marks and adds up in their order. It waits for
// teams of lower numbers only, which were started before it. A mark is launch_id, which no other launch had, and is
// removed when it was seen: so no workspace has to be cleared before, and a graph can be replayed with the same
// launch_id. What memory held before is a launch_id by a chance of 2^-64.
//
// Which parts there are, and the order of all sums, follows from the lengths and the number of teams: two runs are
// bitwise equal. A sequence's result depends on the others in the call, by where its parts are cut.
//
// Not so where batch_invariant asks for it: then a sequence is cut into splits, by its own length only, of a whole
// number of tiles, and a part is a number of whole splits:
//
//     sequences    │            0            │  1  │2│        3        │
//     splits       │       │       │       │ │     │ │       │       │ │
//     parts        └────── 0 ──────┴────────── 1 ──────────┴──── 2 ────┘
//
// Where a split ends, its result goes to the workspace, and the warps begin anew, while the ring runs on. Who ends the
// sequence adds up its splits in their order, four at a time, and which four follows from the keys' positions. A row
// that sees nothing of a split adds zero to it. So a row's result follows from its own keys and the splits, whoever has
// them, and whichever other rows its sequence has; with scales of tokens also from those rows, by V's largest.
//
// K and V of 8 bits become fp16 in registers, where they are exact, and so does Q, each row times a power of two that
// brings its largest value to 1 … 2 (bf16 has the larger range). A warp takes 32 keys of a tile, so that a stage is as
// large. A scale of the head is left to the scores and to O; those of the tokens are copied with their rows: K's
// multiply the scores, V's the P, relative to the largest that the warp has seen, so that fp16 holds the products.
//
// Poison: no key outside the union of the ranges that a sequence's rows see is read, nor used an entry of the block
// table for one; their rows are zeros in shared memory (0 * NaN is NaN). A page number outside the cache gives a row of
// zeros. A key within that union that only some rows see is read and must be finite for all.
//
// Limits: D and Dv are multiples of 8 (of 16, K and V of 8 bits) up to 256; rows 16-byte aligned; fewer than 2^30 tiles
// a head at full length.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "arch/cp_async.cuh"
#include "arch/e4m3.cuh"
#include "arch/global_memory.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "arch/reduce.cuh"
#include "arch/warp_gemm_8bit.cuh"
#include "arch/warp_gemm_sm80.cuh"
#include "attention/paged_decode_launch.h"
#include "attention/paged_decode_plan.cuh"
#include "attention/softmax.cuh"

namespace fastattn {

// ---------------------------------------------------------------------------------------------
// Shared memory

// Of one warp. Once consumed, a stage can take its O: 16 rows of fp32 are as large as its keys and values.
template <typename KV, int HEAD_DIM>
struct PagedDecodeRing {
  static constexpr int kStages = paged_decode_stages(HEAD_DIM);
  static constexpr int kMaxThreads = 32 * paged_decode_max_warps(HEAD_DIM);
  static constexpr bool k8Bit = sizeof(KV) == 1;
  static constexpr int kKeys = paged_decode_warp_keys(k8Bit);
  static constexpr int kColumns = HEAD_DIM * sizeof(KV) / 2;  // of a row, as 16-bit values

  struct Rows {
    uint16_t k[kKeys * kColumns];
    uint16_t v[kKeys * kColumns];
  };
  struct RowsWithScales : Rows {
    float k_scale[kKeys];  // of tokens only
    float v_scale[kKeys];
  };
  using Stage = std::conditional_t<k8Bit, RowsWithScales, Rows>;
  static_assert(sizeof(Rows) == kPagedDecodeRows * HEAD_DIM * sizeof(float));

  alignas(128) Stage stages[kStages];
};

// What a warp has found for each row, beside O.
struct DecodeRowSums {
  float row_max[kPagedDecodeRows];
  float row_sum[kPagedDecodeRows];
};

// Where four neighbouring dims of a row lie in a stage that holds O: rows begin in different banks.
template <int HEAD_DIM>
__device__ __forceinline__ int out_offset(int row, int group) {
  return row * HEAD_DIM + (group ^ (row & 7)) * 4;
}

// ---------------------------------------------------------------------------------------------
// Loads of one warp, tile after tile over the borders of sequences. Lane l knows where the l-th of a tile's rows lies:
// key l of 16 for l < 16, value l - 16 for the others; or, of 8 bits, key l of 32, and then value l.

template <typename KV, int HEAD_DIM, typename Mask, typename Team>
class DecodeLoader {
  using Ring = PagedDecodeRing<KV, HEAD_DIM>;
  using Stage = typename Ring::Stage;
  static constexpr int KEYS = Ring::kKeys;
  static constexpr int CHUNK = 16 / sizeof(KV);                                           // elements of 16 bytes
  static constexpr int CHUNKS = HEAD_DIM / CHUNK;                                         // of a row
  static constexpr int LANES = (CHUNKS & (CHUNKS - 1)) == 0 ? CHUNKS : CHUNKS & -CHUNKS;  // along a row
  static constexpr int ROWS_PER_PASS = 32 / LANES;

 public:
  __device__ __forceinline__ DecodeLoader(const PagedDecodeParams& p, const DecodePlan<Mask>& plan)
      : p_(p), plan_(plan), cursor_(plan), tile_(plan.begin_tile) {}

  // Asks for the next tile, if there is one, and closes the group.
  __device__ __forceinline__ void load(Stage& stage) {
    if (tile_ < plan_.end_tile) {
      if (tile_ == max(cursor_.seq_end, plan_.begin_tile)) begin_sequence();
      load_rows(stage);
      ++tile_;
      key_ += p_.config.block_n;
      find_page();
    }
    cp_async_commit();
  }

 private:
  __device__ __forceinline__ bool key_is_visible() const { return key_ >= visible_.begin && key_ < visible_.end; }

  __device__ __forceinline__ void begin_sequence() {
    const int32_t seq_idx = cursor_.next_seq_idx;
    visible_ = cursor_.next(p_, plan_).visible;
    key_ = cursor_.first_key + Team{p_}.warp_idx() * KEYS + threadIdx.x % KEYS;
    block_table_ = p_.block_table + seq_idx * p_.block_table_stride;
    find_page();
    if (!p_.paged) {
      page_ = seq_idx;
      first_token_ = p_.cu_seqlens_k == nullptr ? 0 : p_.cu_seqlens_k[seq_idx];
    }
  }

  // One tile ahead of its use.
  __device__ __forceinline__ void find_page() {
    if (p_.paged && key_is_visible()) page_ = block_table_[p_.block_size_div.divide(key_)];
  }

  __device__ __forceinline__ void load_rows(Stage& stage) const {
    bool exists = key_is_visible();
    const int64_t block = page_;
    int32_t token = first_token_ + key_;
    if (p_.paged) {
      exists = exists && page_ >= 0 && page_ < p_.num_blocks;
      token = p_.block_size_div.remainder(key_);
    }
    const uint32_t rows_exist = __ballot_sync(0xffffffffu, exists);
    const auto row_of = [&](bool is_value) {
      const KV* const row = static_cast<const KV*>(is_value ? p_.v : p_.k) +
                            plan_.kv_head_idx * (is_value ? p_.v_head_stride : p_.k_head_stride);
      if (!exists) return row;
      return row + block * (is_value ? p_.v_block_stride : p_.k_block_stride) +
             token * (is_value ? p_.v_token_stride : p_.k_token_stride);
    };
    const KV* const own_row = row_of(threadIdx.x % 32 >= KEYS);
    load_operand(stage.k, own_row, 0, rows_exist, p_.head_dim);
    load_operand(stage.v, KEYS < 32 ? own_row : row_of(true), KEYS % 32, rows_exist, p_.v_head_dim);
    if constexpr (Ring::k8Bit) {
      if (p_.scales_of_tokens) {
        const auto load_scale = [&](float* target, const KvScale& scale) {
          const float* source = scale.data + plan_.kv_head_idx * scale.head_stride;
          if (exists) source += block * scale.block_stride + token * scale.token_stride;
          cp_async_4(target + threadIdx.x % 32, source, exists);
        };
        load_scale(stage.k_scale, p_.k_scale);
        load_scale(stage.v_scale, p_.v_scale);
      }
    }
  }

  __device__ __forceinline__ void load_operand(uint16_t* tile, const KV* own_row, int first_lane, uint32_t rows_exist,
                                               int32_t head_dim) const {
    const int lane = threadIdx.x % 32;
    const int lane_row = lane / LANES;
    const uint64_t policy = plan_.tiles_per_part <= p_.config.few_tiles ? evict_first_policy() : evict_normal_policy();
#pragma unroll
    for (int i = 0; i < KEYS; i += ROWS_PER_PASS) {
      const KV* const source = reinterpret_cast<const KV*>(
          __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(own_row), first_lane + i + lane_row));
#pragma unroll
      for (int chunk = lane % LANES; chunk < CHUNKS; chunk += LANES) {
        const bool in_row = chunk * CHUNK < head_dim;
        cp_async_16(tile + swizzled<Ring::kColumns>(i + lane_row, chunk), source + (in_row ? chunk * CHUNK : 0),
                    in_row && (rows_exist >> (first_lane + i + lane_row) & 1) != 0, policy);
      }
    }
  }

  const PagedDecodeParams& p_;
  const DecodePlan<Mask>& plan_;
  DecodeCursor<Mask> cursor_;
  int32_t tile_;  // the next one, and the lane's key in it
  int32_t key_ = 0;
  int32_t page_ = 0;         // of that key; of contiguous keys the sequence
  int32_t first_token_ = 0;  // of contiguous keys, of the sequence
  KeyRange visible_;
  const int32_t* block_table_;
};

// ---------------------------------------------------------------------------------------------
// K and V of 8 bits

// Half of the fragments that warp_scores_8bit wants: a lane's share of a row of q, in fp16 and times a power of two,
// and what its products are to be multiplied by to undo that. Dims from head_dim on are zeros. By whole warps.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void load_q_8bit(uint32_t (&q_frag)[HEAD_DIM / 16][4], float& row_scale, const T* row,
                                            int half, int32_t head_dim) {
  constexpr int CHUNKS = HEAD_DIM / 16;
  uint2 fours[CHUNKS];
  float largest = 0.0f;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    fours[chunk] = make_uint2(0, 0);
    if (chunk * 16 < head_dim) {
      fours[chunk] = *reinterpret_cast<const uint2*>(row + chunk * 16 + threadIdx.x % 4 * 4);
    }
    const float2 low = unpack_pair<T>(fours[chunk].x), high = unpack_pair<T>(fours[chunk].y);
    largest = fmaxf(largest, fmaxf(fmaxf(fabsf(low.x), fabsf(low.y)), fmaxf(fabsf(high.x), fabsf(high.y))));
  }
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
  // From the bits of its exponent; above 2^126 the inverse would be 0.
  const uint32_t exponent = min(__float_as_uint(largest) >> 23, 253u);
  row_scale = __uint_as_float(exponent << 23);
  const float inverse = __uint_as_float((254u - exponent) << 23);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const float2 low = unpack_pair<T>(fours[chunk].x), high = unpack_pair<T>(fours[chunk].y);
    q_frag[chunk][half] = pack_pair<__half>(low.x * inverse, low.y * inverse);
    q_frag[chunk][2 + half] = pack_pair<__half>(high.x * inverse, high.y * inverse);
  }
}

__device__ __forceinline__ float scale_of_head(const KvScale& scale, int32_t kv_head_idx) {
  return scale.data == nullptr ? 1.0f : scale.data[kv_head_idx * scale.head_stride];
}

// Those of a lane's columns of the scores, or ones.
template <int KEY_TILES>
__device__ __forceinline__ void scales_of_lane(float (&scales)[KEY_TILES][2], const float* of_keys, bool there) {
#pragma unroll
  for (int tile = 0; tile < KEY_TILES; ++tile) {
    const float2 pair =
        there ? *reinterpret_cast<const float2*>(of_keys + tile * 8 + threadIdx.x % 4 * 2) : make_float2(1.0f, 1.0f);
    scales[tile][0] = pair.x;
    scales[tile][1] = pair.y;
  }
}

// ---------------------------------------------------------------------------------------------
// Results

// Four dims of a row relative to a reference of exponentials, and their sum.
struct DecodePartial {
  float row_max = -INFINITY;
  float row_sum = 0.0f;
  float sums[4] = {};

  // All of N more at once; the order of additions is theirs. One that has seen nothing changes no bit. What is rounded
  // when is explicit: this is compiled in several places, and which of them adds up a sequence depends on the batch.
  template <int N>
  __device__ __forceinline__ void add(const float2 (&others)[N], const float4 (&other_sums)[N]) {
    float new_max = row_max;
#pragma unroll
    for (int i = 0; i < N; ++i) new_max = fmaxf(new_max, others[i].x);
    const float correction = exp2_approx(row_max - finite_max(new_max));
    row_max = new_max;
    row_sum = __fmul_rn(row_sum, correction);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = __fmul_rn(sums[i], correction);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float weight = exp2_approx(others[i].x - finite_max(new_max));
      row_sum = __fmaf_rn(weight, others[i].y, row_sum);
      sums[0] = __fmaf_rn(weight, other_sums[i].x, sums[0]);
      sums[1] = __fmaf_rn(weight, other_sums[i].y, sums[1]);
      sums[2] = __fmaf_rn(weight, other_sums[i].z, sums[2]);
      sums[3] = __fmaf_rn(weight, other_sums[i].w, sums[3]);
    }
  }
};

// Where a column's rows of a sequence go.
template <typename T, typename Mask>
struct DecodeOutput {
  const PagedDecodeParams& p;
  const DecodePlan<Mask>& plan;
  int64_t out_token;  // the sequence's first one in out
  int64_t lse_begin;  // where the sequence begins in lse
  int32_t num_rows;

  __device__ __forceinline__ DecodeOutput(const PagedDecodeParams& params, const DecodePlan<Mask>& of_cta,
                                          const DecodeSequence<Mask>& sequence, int32_t seq_idx)
      : p(params), plan(of_cta), num_rows(sequence.num_rows) {
    const bool packed_q = p.cu_seqlens_q != nullptr;
    out_token = packed_q ? sequence.q_start : static_cast<int64_t>(seq_idx) * p.batch_q_len;
    lse_begin = packed_q ? sequence.q_start : out_token * p.num_heads;
  }

  __device__ __forceinline__ void store(int32_t row, int group, const DecodePartial& result) const {
    const int32_t token = p.group_size.divide(plan.first_row + row);
    const int32_t head = plan.head(p, plan.first_row + row);
    const float sink = p.sinks == nullptr || row >= num_rows ? -INFINITY : p.sinks[head] * kLog2E;
    const RowResult final = finish_row(result.row_max, result.row_sum, sink);
    const float (&sums)[4] = result.sums;
    const int64_t element = ((out_token + token) * p.num_heads + head) * p.v_head_dim + group * 4;
    if (__builtin_expect(p.out_scale != nullptr, 0)) {
      const float inverse = __fdividef(final.inverse, *p.out_scale);
      *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(p.out) + element) =
          pack_e4m3(sums[0] * inverse, sums[1] * inverse, sums[2] * inverse, sums[3] * inverse);
    } else {
      *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + element) =
          make_uint2(pack_pair<T>(sums[0] * final.inverse, sums[1] * final.inverse),
                     pack_pair<T>(sums[2] * final.inverse, sums[3] * final.inverse));
    }
    if (group == 0) {
      p.lse[lse_begin + head * (p.cu_seqlens_q != nullptr ? p.num_tokens : p.batch_q_len) + token] = final.lse;
    }
  }
};

// ---------------------------------------------------------------------------------------------
// Kernel

// T: of q and out. KV: T, __nv_fp8_e4m3 or int8_t. Mask: AttentionMask or TreeMask. BESIDE: prompts, on Hopper.
template <typename T, typename KV, int HEAD_DIM, typename Mask, bool BESIDE, bool INVARIANT>
__global__ void __launch_bounds__(PagedDecodeRing<KV, HEAD_DIM>::kMaxThreads, 1)
    paged_decode_kernel(const __grid_constant__ PagedDecodeParams p, const ScoreScale score_scale) {
  using Ring = PagedDecodeRing<KV, HEAD_DIM>;
  constexpr bool K_8BIT = Ring::k8Bit;
  constexpr int KEYS = Ring::kKeys, KEY_TILES = KEYS / 8;
  constexpr int STAGES = Ring::kStages;
  constexpr int GROUPS = HEAD_DIM / 4;  // of four dims, which one thread takes when results are added up
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (BESIDE) return __trap();  // never launched, and never silent
#endif
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  const int num_warps = p.config.num_warps;
  using Team = DecodeTeam<BESIDE>;
  const Team team = {p};
  const int warp_idx = threadIdx.x / 32;  // of the CTA
  Ring* const rings = reinterpret_cast<Ring*>(smem_bytes);
  DecodeRowSums* const warp_sums = reinterpret_cast<DecodeRowSums*>(rings + (BESIDE ? 2 : 1) * num_warps);
  const int lane = threadIdx.x % 32;

  // The table comes to the L2 cache while the lengths, which say what of it is needed, are on their way. A large one
  // does not, since much of it may not be needed.
  if (p.paged && p.max_blocks > 0) {
    constexpr int64_t kLine = 32, kMost = 16384;  // entries
    const int64_t entries = (p.num_seqs - 1) * p.block_table_stride + p.max_blocks;
    const int64_t entry = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kLine;
    if (entries <= kMost && entry < entries) prefetch_l2(p.block_table + entry);
  }

  // Prompts' kernel does not wait for the kernel in front of this one, and must not begin before that has ended.
  if constexpr (!BESIDE) grid_dependency_launch();
  grid_dependency_wait();
  if constexpr (BESIDE) grid_dependency_launch();
  const DecodePlan<Mask> plan(p, team, std::bool_constant<INVARIANT>());
  if (plan.begin_tile >= plan.end_tile) return;
  DecodeLoader<KV, HEAD_DIM, Mask, Team> loader(p, plan);

  // Softcap and ALiBi give scores in base 2; without them the softmax scales.
  const bool general = score_scale.softcap > 0.0f || p.alibi_slopes != nullptr;
  const float softmax_scale = general ? 1.0f : score_scale.pre;

  const auto partial_row = [&](int64_t slot, int32_t row) { return slot * p.config.rows_of_slot + row; };
  const auto partial_out = [&](int64_t slot_row, int group) {
    return reinterpret_cast<float4*>(p.partial_out + slot_row * p.v_head_dim + group * 4);
  };
  // f(row, group) for each four dims of each row, over the team's threads.
  const auto each_group = [&](int32_t num_rows, auto f) {
#pragma unroll 1
    for (int i = team.thread_idx(); i < num_rows * GROUPS; i += team.num_threads()) {
      if (i % GROUPS * 4 < p.v_head_dim) f(i / GROUPS, i % GROUPS);
    }
  };
  // Slots of the workspace: of the part that a team hands on, and of that with which it ends a sequence.
  const auto team_of = [&](int32_t part) { return part * plan.num_columns + plan.column_idx; };
  const auto handed_slot = [&](int32_t part) { return 2 * team_of(part); };
  const int32_t ended_slot = handed_slot(plan.part_idx) + 1;
  // Batch-invariant: that of the first split of a sequence that begins with this tile.
  const auto first_slot = [&](int32_t seq_begin, bool is_shared) {
    const int32_t part = seq_begin / plan.tiles_per_part;
    return (2 * team_of(part) + (is_shared ? 0 : 1)) * p.config.slots_of_area;
  };
  // Adds up the slots of a sequence's splits, BATCH of which are on their way at the same time.
  constexpr int ADDENDS = 4;
  const auto add_splits = [&](auto batch, const DecodeSplits& splits, int32_t slot, int32_t row, int group) {
    constexpr int BATCH = decltype(batch)::value;
    DecodePartial result;
#pragma unroll 1
    for (int32_t split = splits.first() / BATCH * BATCH; split <= splits.last(); split += BATCH) {
      float2 sums[BATCH / ADDENDS][ADDENDS];
      float4 outs[BATCH / ADDENDS][ADDENDS];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int32_t existing = min(max(split + i, splits.first()), splits.last());
        const int64_t slot_row = partial_row(slot + existing - splits.first(), row);
        sums[i / ADDENDS][i % ADDENDS] = __ldcg(p.partial_sum + slot_row);
        outs[i / ADDENDS][i % ADDENDS] = __ldcg(partial_out(slot_row, group));
        if (split + i != existing) sums[i / ADDENDS][i % ADDENDS].x = -INFINITY;
      }
#pragma unroll
      for (int i = 0; i < BATCH / ADDENDS; ++i) result.add(sums[i], outs[i]);
    }
    return result;
  };

  // ---- tiles
  DecodeCursor<Mask> cursor(plan);
  DecodeSequence<Mask> sequence;
  int32_t first_key = 0;
  uint32_t q_frag[HEAD_DIM / 16][4];
  OnlineSoftmax<1> softmax;
  float acc[1][HEAD_DIM / 8][4];
  // K and V of 8 bits: what scores are to be multiplied by, and O.
  constexpr float kLeastScale = 1e-30f;
  float row_scale[2], value_scale = 1.0f;
  // The KV head's row of a lane's scores [..][2 * half ..]; behind the end it is the last one again.
  const auto lane_row = [&](int half) {
    return plan.first_row + max(min(half * 8 + lane / 4, sequence.num_rows - 1), 0);
  };

  const auto begin_sums = [&] {
    if (K_8BIT && p.scales_of_tokens) value_scale = kLeastScale;
    softmax = OnlineSoftmax<1>();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) acc[0][i / 4][i % 4] = 0.0f;
  };
  // Batch-invariant, of the sequence in hand, once first_key is that of the next tile; made anew, since registers are
  // short.
  const auto splits_now = [&](int32_t tile) {
    const int32_t tile_of_all = (first_key >> p.config.block_n_log2) - 1;
    return DecodeSplits(p, tile_of_all - (tile - cursor.seq_begin), cursor.seq_end - cursor.seq_begin);
  };

  int stage = 0;
  if constexpr (INVARIANT) begin_sums();
  // The first sequence begins while its keys are on their way: Q is asked for behind the first tile.
  int32_t next_begin = plan.begin_tile - (STAGES - 2);
#pragma unroll 1
  for (int32_t tile = plan.begin_tile - (STAGES - 1); tile < plan.end_tile; ++tile) {
    if (tile == next_begin) {
      if constexpr (!INVARIANT) begin_sums();
      const int32_t seq_idx = cursor.next_seq_idx;
      sequence = cursor.next(p, plan);
      next_begin = cursor.seq_end;
      first_key = cursor.first_key + team.warp_idx() * KEYS;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = half * 8 + lane / 4, row_of_head = plan.first_row + row;
        const T* const source = static_cast<const T*>(p.q) + seq_idx * p.q_batch_stride +
                                (sequence.q_start + p.group_size.divide(row_of_head)) * p.q_token_stride +
                                plan.head(p, row_of_head) * p.q_head_stride;
        if constexpr (K_8BIT) {
          load_q_8bit<T, HEAD_DIM>(q_frag, row_scale[half], source, half, row < sequence.num_rows ? p.head_dim : 0);
          if (!p.scales_of_tokens) row_scale[half] *= scale_of_head(p.k_scale, plan.kv_head_idx);
        } else {
#pragma unroll
          for (int chunk = 0; chunk < HEAD_DIM / 8; ++chunk) {
            const bool valid = row < sequence.num_rows && chunk * 8 < p.head_dim;
            const T* const pair = source + chunk * 8 + 2 * (lane % 4);
            q_frag[chunk / 2][chunk % 2 * 2 + half] = valid ? *reinterpret_cast<const uint32_t*>(pair) : 0;
          }
        }
      }
      if constexpr (K_8BIT) {
        if (!p.scales_of_tokens) value_scale = scale_of_head(p.v_scale, plan.kv_head_idx);
      }
    }
    cp_async_wait<STAGES - 2>();
    __syncwarp();  // the other lanes' copies are here, and all are done with the stage before, which is loaded next
    loader.load(rings[warp_idx].stages[stage]);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    if (tile < plan.begin_tile) continue;
    typename Ring::Stage& now = rings[warp_idx].stages[stage];

    float scores[1][KEY_TILES][4] = {};
    if constexpr (K_8BIT) {
      warp_scores_8bit<KV>(scores[0], q_frag, KeyRows<HEAD_DIM>(now.k));
      float k_scale[KEY_TILES][2];
      scales_of_lane(k_scale, now.k_scale, p.scales_of_tokens);
#pragma unroll
      for (int i = 0; i < 4 * KEY_TILES; ++i) scores[0][i / 4][i % 4] *= row_scale[i % 4 / 2] * k_scale[i / 4][i % 2];
    } else {
      float odd_scores[KEY_TILES][4] = {};  // a second chain of products
      const WarpOperandB<HEAD_DIM> keys(now.k, 0);
#pragma unroll
      for (int kk = 0; kk < HEAD_DIM / 16; ++kk) {
        uint32_t k_frag[4];
        keys.load(k_frag, 0, kk);
        auto& sums = kk % 2 == 0 ? scores[0] : odd_scores;
        mma_m16n8k16<T>(sums[0], q_frag[kk], k_frag[0], k_frag[1]);
        mma_m16n8k16<T>(sums[1], q_frag[kk], k_frag[2], k_frag[3]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[0][i / 4][i % 4] += odd_scores[i / 4][i % 4];
    }

    const Mask& mask = sequence.mask;
    const int32_t lane_key = first_key + 2 * (lane % 4);
    if (general) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int32_t row = lane_row(half);
        const typename Mask::Row mask_row = mask.row(p.group_size.divide(row));
        float slope = 0.0f;
        if (p.alibi_slopes != nullptr) {
          slope = kLog2E * p.alibi_slopes[(cursor.next_seq_idx - 1) * p.alibi_batch_stride + plan.head(p, row)];
        }
#pragma unroll
        for (int j = 0; j < 2 * KEY_TILES; ++j) {
          float& score = scores[0][j / 2][half * 2 + j % 2];
          score *= score_scale.pre;
          if (score_scale.softcap > 0.0f) score = score_scale.softcap * tanh_exp2(score);
          score -= slope * mask_row.distance(lane_key + j / 2 * 8 + j % 2);
        }
      }
    }
    // Not where all rows see all of the warp's keys.
    const KeyRange seen_by_all = mask.seen_by_all(sequence.first_token, sequence.last_token);
    if (first_key < seen_by_all.begin || first_key + KEYS > seen_by_all.end) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const typename Mask::Row mask_row = mask.row(p.group_size.divide(lane_row(half)));
#pragma unroll
        for (int j = 0; j < 2 * KEY_TILES; ++j) {
          if (!mask_row.sees(lane_key + j / 2 * 8 + j % 2)) scores[0][j / 2][half * 2 + j % 2] = -INFINITY;
        }
      }
    }
    softmax.update(scores, acc, softmax_scale);
    if constexpr (K_8BIT) {
      if (p.scales_of_tokens) {
        const float largest = warp_reduce(fabsf(now.v_scale[lane]), [](float a, float b) { return fmaxf(a, b); });
        if (largest > value_scale) {
          const float correction = value_scale / largest;
          value_scale = largest;
#pragma unroll
          for (int i = 0; i < HEAD_DIM / 2; ++i) acc[0][i / 4][i % 4] *= correction;
        }
        float v_scale[KEY_TILES][2];
        scales_of_lane(v_scale, now.v_scale, true);
        const float inverse = 1.0f / value_scale;
#pragma unroll
        for (int i = 0; i < 4 * KEY_TILES; ++i) scores[0][i / 4][i % 4] *= v_scale[i / 4][i % 2] * inverse;
      }
      warp_gemm_8bit<KV>(acc[0], scores[0], KeyRows<HEAD_DIM>(now.v));
    } else {
      warp_gemm_registers<T, 3>(acc, scores, WarpOperandB<HEAD_DIM, true>(now.v, 0));
    }
    first_key += p.config.block_n;
    if (tile + 1 < min(cursor.seq_end, plan.end_tile)) {
      if constexpr (!INVARIANT) continue;
      const int32_t in_sequence = tile - cursor.seq_begin;
      if (splits_now(tile).end_behind(in_sequence) != in_sequence + 1) continue;
    }

    // ---- the end of a sequence, or of the team's part of it, or of a split: the warps' results go to the stages
    // consumed last
    softmax.finish(softmax_scale);
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half * 8 >= sequence.num_rows) continue;
      const int row = half * 8 + lane / 4;
      if (lane % 4 == 0) {
        warp_sums[warp_idx].row_max[row] = softmax.row_max[0][half];
        warp_sums[warp_idx].row_sum[row] = softmax.row_sum[0][half];
      }
      float* const target = reinterpret_cast<float*>(&now);
#pragma unroll
      for (int nn = 0; nn < HEAD_DIM / 8; ++nn) {
        const float (&sums)[4] = acc[0][nn];
        if constexpr (!K_8BIT) {
          *reinterpret_cast<float2*>(target + out_offset<HEAD_DIM>(row, nn * 2 + lane % 4 / 2) + lane % 2 * 2) =
              make_float2(sums[2 * half], sums[2 * half + 1]);
        } else if (nn % 2 == 0) {
          const float (&odd_sums)[4] = acc[0][nn + 1];
          *reinterpret_cast<float4*>(target + out_offset<HEAD_DIM>(row, nn * 2 + lane % 4)) =
              make_float4(sums[2 * half] * value_scale, odd_sums[2 * half] * value_scale,
                          sums[2 * half + 1] * value_scale, odd_sums[2 * half + 1] * value_scale);
        }
      }
    }
    team.sync();
    const bool begins_here = cursor.seq_begin >= plan.begin_tile, ends_here = cursor.seq_end <= plan.end_tile;
    const DecodeOutput<T, Mask> output(p, plan, sequence, cursor.next_seq_idx - 1);
    const int first_warp = team.first_warp();
    bool whole = begins_here && ends_here;
    int32_t slot = ends_here ? ended_slot : handed_slot(plan.part_idx);
    if constexpr (INVARIANT) {
      const DecodeSplits splits = splits_now(tile);
      slot = first_slot(cursor.seq_begin, !whole) + splits.of(tile - cursor.seq_begin) - splits.first();
      whole = splits.first() == splits.last();
    }
    each_group(sequence.all_rows, [&](int32_t row, int group) {
      DecodePartial result;
      if (row < sequence.num_rows) {
#pragma unroll 1
        for (int w = 0; w < num_warps; w += 4) {
          float2 sums[4];
          float4 outs[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int from = first_warp + min(w + i, num_warps - 1);
            sums[i] =
                make_float2(w + i < num_warps ? warp_sums[from].row_max[row] : -INFINITY, warp_sums[from].row_sum[row]);
            outs[i] = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(&rings[from].stages[stage]) +
                                                       out_offset<HEAD_DIM>(row, group));
          }
          result.add(sums, outs);
        }
      }
      if (whole) return output.store(row, group, result);
      const int64_t slot_row = partial_row(slot, row);
      *partial_out(slot_row, group) = make_float4(result.sums[0], result.sums[1], result.sums[2], result.sums[3]);
      if (group == 0) p.partial_sum[slot_row] = make_float2(result.row_max, result.row_sum);
    });
    team.sync();  // the stages are free again
    if constexpr (INVARIANT) {
      if (!whole && tile + 1 == cursor.seq_end && begins_here) {
        const DecodeSplits splits = splits_now(tile);
        const int32_t first = first_slot(cursor.seq_begin, false);
        each_group(sequence.all_rows, [&](int32_t row, int group) {
          output.store(row, group, add_splits(std::integral_constant<int, ADDENDS>(), splits, first, row, group));
        });
      }
    }
    if constexpr (INVARIANT) begin_sums();
  }

  // ---- what is handed on is there: this thread has seen that all have written
  if (cursor.seq_end > plan.end_tile && team.thread_idx() == 0) {
    store_release(p.marks + team_of(plan.part_idx), p.launch_id);
  }

  // ---- the sequence that the team has ended, but not begun
  const DecodeSequence<Mask> ended(p, plan.seq_idx, plan.first_row);
  if (plan.seq_begin >= plan.begin_tile || plan.seq_begin + ended.num_tiles(p) > plan.end_tile) return;
  const auto wait_for = [&](int32_t part) {
    uint64_t* const mark = p.marks + team_of(part);
    while (load_acquire(mark) != p.launch_id) {
    }
    *mark = 0;
  };
  const DecodeOutput<T, Mask> output(p, plan, ended, plan.seq_idx);
  if constexpr (INVARIANT) {
    const DecodeSplits splits(p, ended.first_tile(p), ended.num_tiles(p));
    const auto part_of = [&](int32_t split) { return (plan.seq_begin + splits.begin_of(split)) / plan.tiles_per_part; };
    for (int32_t split = splits.first() + team.thread_idx(); split < splits.last(); split += team.num_threads()) {
      // A part that has several marks them once; and where splits are long, there are parts without any.
      const int32_t part = part_of(split);
      if (part < plan.part_idx && part != part_of(split + 1)) wait_for(part);
    }
    team.sync();
    const int32_t slot = first_slot(plan.seq_begin, true);
    each_group(ended.all_rows, [&](int32_t row, int group) {
      output.store(row, group, add_splits(std::integral_constant<int, 16>(), splits, slot, row, group));
    });
    return;
  }
  const int32_t first_part = plan.seq_begin / plan.tiles_per_part;
  for (int32_t part = first_part + team.thread_idx(); part < plan.part_idx; part += team.num_threads()) wait_for(part);
  team.sync();
  each_group(ended.all_rows, [&](int32_t row, int group) {
    constexpr int BATCH = 16;  // parts that are on their way at the same time
    DecodePartial result;
#pragma unroll 1
    for (int32_t part = first_part; part <= plan.part_idx; part += BATCH) {
      float2 sums[BATCH];
      float4 outs[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int64_t slot_row = partial_row(part + i < plan.part_idx ? handed_slot(part + i) : ended_slot, row);
        sums[i] = __ldcg(p.partial_sum + slot_row);
        outs[i] = __ldcg(partial_out(slot_row, group));
        if (part + i > plan.part_idx) sums[i].x = -INFINITY;
      }
      result.add(sums, outs);
    }
    output.store(row, group, result);
  });
}

// ---------------------------------------------------------------------------------------------
// Host

template <typename T, typename KV, int HEAD_DIM, typename Mask, bool BESIDE>
cudaError_t launch_paged_decode(const PagedDecodeParams& p, cudaStream_t stream) {
  const int num_warps = p.config.num_warps * (BESIDE ? 2 : 1);
  const int smem_bytes = num_warps * static_cast<int>(sizeof(PagedDecodeRing<KV, HEAD_DIM>) + sizeof(DecodeRowSums));
  const auto kernel = p.config.batch_invariant ? paged_decode_kernel<T, KV, HEAD_DIM, Mask, BESIDE, true>
                                               : paged_decode_kernel<T, KV, HEAD_DIM, Mask, BESIDE, false>;
  return launch_kernel_behind(kernel, p.config.num_ctas, 32 * num_warps, smem_bytes, stream, p,
                              ScoreScale::make(p.softmax_scale, p.softcap));
}

}  // namespace fastattn
