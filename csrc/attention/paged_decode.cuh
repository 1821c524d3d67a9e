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
// A warp takes 16 keys of each tile (32 at a head dim of 64 and of 8 bits), by itself: it loads them (cp.async) into a
// ring of its own, which runs ahead over the borders of sequences, and has a maximum, sum and O of its own. There is no
// barrier but at the end of a sequence:
//
//     warp 0   ═ tile 0 keys  0-15 ═╪═ tile 1 keys  0-15 ═╪═ …   ┐
//     warp 1   ═ tile 0 keys 16-31 ═╪═ tile 1 keys 16-31 ═╪═ …   │ merged in warp order where a sequence (or the team's
//     warp 2   ═ tile 0 keys 32-47 ═╪═ tile 1 keys 32-47 ═╪═ …   │ part of it) ends, through the stages consumed last
//     ...                                                        ┘
//
// Up to head dim 128, above which registers are short, the lengths of a sequence have been asked for when the one
// before it began, and its first page when that one's last tile was; where a ring has two stages, Q comes with its
// first tile. So a warp waits for memory once at a border, as within a sequence.
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
// Few short sequences have a kernel of their own, in paged_decode_cluster.cuh, and of these those of few rows and keys
// another, in paged_decode_short.cuh.
//
// Limits: D and Dv are multiples of 8 (of 16, K and V of 8 bits) up to 256; rows 16-byte aligned; fewer than 2^30 tiles
// a head at full length.
#pragma once

#include "arch/global_memory.cuh"
#include "arch/grid_dependency.cuh"
#include "arch/launch.cuh"
#include "attention/paged_decode_cluster.cuh"
#include "attention/paged_decode_launch.h"
#include "attention/paged_decode_short.cuh"

namespace fastattn {

// ---------------------------------------------------------------------------------------------
// Loads of one warp, tile after tile over the borders of sequences. Lane l knows where the l-th of a tile's rows lies:
// key l of 16 for l < 16, value l - 16 for the others; or, of 8 bits, key l of 32, and then value l.

template <typename KV, int HEAD_DIM, typename Mask, typename Team>
class DecodeLoader {
  using Ring = PagedDecodeRingWithQ<KV, HEAD_DIM>;
  using Stage = typename Ring::Stage;
  static constexpr int KEYS = Ring::kKeys;

 public:
  __device__ __forceinline__ DecodeLoader(const PagedDecodeParams& p, const DecodePlan<Mask>& plan)
      : p_(p), plan_(plan), cursor_(plan), tile_(plan.begin_tile) {
    if constexpr (Ring::kLooksAhead) {
      next_lengths_ = DecodeLengths(p, plan.seq_idx);
      begin_sequence();
    }
  }

  // Asks for the next tile, if there is one, and closes the group.
  __device__ __forceinline__ void load(Ring& ring, int stage) {
    if (tile_ < plan_.end_tile) {
      if constexpr (Ring::kHasQ) {
        if (begins_) load_q(ring.q);
        begins_ = false;
      }
      if constexpr (!Ring::kLooksAhead) {
        if (tile_ == max(cursor_.seq_end, plan_.begin_tile)) begin_sequence();
      }
      load_rows(ring.stages[stage]);
      ++tile_;
      if (!Ring::kLooksAhead || tile_ < cursor_.seq_end) {
        key_ += p_.config.block_n;
        find_page();
      } else if (tile_ < plan_.end_tile) {
        begin_sequence();
      }
    }
    cp_async_commit();
  }

 private:
  __device__ __forceinline__ bool key_is_visible() const { return key_ >= visible_.begin && key_ < visible_.end; }

  // With registers for that a tile ahead of its first use, as its page is found then; and the lengths of the one behind
  // it a sequence ahead.
  __device__ __forceinline__ void begin_sequence() {
    const int32_t seq_idx = cursor_.next_seq_idx;
    if constexpr (!Ring::kLooksAhead) next_lengths_ = DecodeLengths(p_, seq_idx);
    const DecodeSequence<Mask> sequence = cursor_.next(p_, plan_, next_lengths_);
    if constexpr (Ring::kLooksAhead) next_lengths_ = DecodeLengths(p_, min(seq_idx + 1, p_.num_seqs - 1));
    visible_ = sequence.visible;
    if constexpr (Ring::kHasQ) {
      begins_ = true;
      q_start_ = sequence.q_start;
      num_rows_ = sequence.num_rows;
      seq_idx_ = seq_idx;
    }
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

  __device__ __forceinline__ void load_q(uint16_t* rows) const {
    constexpr int CHUNKS = HEAD_DIM / 8;
    const int32_t chunks_of_row = p_.head_dim / 8;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < num_rows_ * CHUNKS; i += 32) {
      const int32_t row = i / CHUNKS, chunk = i % CHUNKS, row_of_head = plan_.first_row + row;
      const uint16_t* const source = static_cast<const uint16_t*>(p_.q) + seq_idx_ * p_.q_batch_stride +
                                     (q_start_ + p_.group_size.divide(row_of_head)) * p_.q_token_stride +
                                     plan_.head(p_, row_of_head) * p_.q_head_stride + chunk * 8;
      if (chunk < chunks_of_row) cp_async_16(rows + row * Ring::kRow + chunk * 8, source, true, evict_normal_policy());
    }
  }

  __device__ __forceinline__ void load_rows(Stage& stage) const {
    bool exists = key_is_visible();
    int32_t token = first_token_ + key_;
    if (p_.paged) {
      exists = exists && page_ >= 0 && page_ < p_.num_blocks;
      token = p_.block_size_div.remainder(key_);
    }
    const DecodeRows<KV, HEAD_DIM> rows = {p_, plan_.kv_head_idx, plan_.tiles_per_part <= p_.config.few_tiles};
    rows.load(stage, exists, page_, token);
  }

  const PagedDecodeParams& p_;
  const DecodePlan<Mask>& plan_;
  DecodeCursor<Mask> cursor_;
  int32_t tile_;  // the next one, and the lane's key in it
  DecodeLengths next_lengths_;
  bool begins_ = false;  // the sequence does, whose Q is in these rows
  int32_t q_start_ = 0, num_rows_ = 0, seq_idx_ = 0;
  int32_t key_ = 0;
  int32_t page_ = 0;         // of that key; of contiguous keys the sequence
  int32_t first_token_ = 0;  // of contiguous keys, of the sequence
  KeyRange visible_;
  const int32_t* block_table_;
};

// ---------------------------------------------------------------------------------------------
// Kernel

// T: of q and out; uint16_t, which of the two is said by the call, where KV is __nv_fp8_e4m3 or int8_t, else T. Mask:
// AttentionMask or TreeMask. BESIDE: prompts, on Hopper.
template <typename T, typename KV, int HEAD_DIM, typename Mask, bool BESIDE, bool INVARIANT>
__global__ void __launch_bounds__(PagedDecodeRingWithQ<KV, HEAD_DIM>::kMaxThreads, 1)
    paged_decode_kernel(const __grid_constant__ PagedDecodeParams p, const ScoreScale score_scale) {
  using Ring = PagedDecodeRingWithQ<KV, HEAD_DIM>;
  constexpr int KEYS = Ring::kKeys;
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
  constexpr bool KEEPS_SUMS = Ring::k8Bit && HEAD_DIM <= 128;  // where registers are not short
  const DecodePlan<Mask> plan(p, team, std::bool_constant<INVARIANT>(), std::bool_constant<KEEPS_SUMS>());
  if (plan.begin_tile >= plan.end_tile) return;
  DecodeLoader<KV, HEAD_DIM, Mask, Team> loader(p, plan);

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
  DecodeProducts<T, KV, HEAD_DIM> products;
  // Batch-invariant, of the sequence in hand, once first_key is that of the next tile; made anew, since registers are
  // short.
  const auto splits_now = [&](int32_t tile) {
    const int32_t tile_of_all = (first_key >> p.config.block_n_log2) - 1;
    return DecodeSplits(p, tile_of_all - (tile - cursor.seq_begin), cursor.seq_end - cursor.seq_begin);
  };

  int stage = 0;
  if constexpr (INVARIANT) products.begin(p);
  // The first sequence begins while its keys are on their way, with Q behind its first tile's rows or among them.
  int32_t next_begin = plan.begin_tile - (STAGES - 2);
#pragma unroll 1
  for (int32_t tile = plan.begin_tile - (STAGES - 1); tile < plan.end_tile; ++tile) {
    const bool begins = tile == next_begin;
    const auto load_q = [&](auto row_of) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = half * 8 + lane / 4;
        if (Ring::kLooksAhead && half * 8 >= sequence.num_rows) {
          products.clear_q(half);
        } else {
          products.load_q(p, half, row_of(row), row < sequence.num_rows, plan.kv_head_idx);
        }
      }
      products.load_value_scale(p, plan.kv_head_idx);
    };
    if (begins) {
      if constexpr (!INVARIANT) products.begin(p);
      const int32_t seq_idx = cursor.next_seq_idx;
      sequence = cursor.next(p, plan);
      next_begin = cursor.seq_end;
      first_key = cursor.first_key + team.warp_idx() * KEYS;
      if constexpr (!Ring::kHasQ) {
        load_q([&](int row) {
          const int32_t row_of_head = plan.first_row + row;
          return static_cast<const T*>(p.q) + seq_idx * p.q_batch_stride +
                 (sequence.q_start + p.group_size.divide(row_of_head)) * p.q_token_stride +
                 plan.head(p, row_of_head) * p.q_head_stride;
        });
      }
    }
    cp_async_wait<STAGES - 2>();
    __syncwarp();  // the other lanes' copies are here, and all are done with the stage before, which is loaded next
    if constexpr (Ring::kHasQ) {
      if (begins) {
        load_q([&](int row) { return reinterpret_cast<const T*>(rings[warp_idx].q) + row * Ring::kRow; });
        __syncwarp();  // the next sequence's Q may come now
      }
    }
    loader.load(rings[warp_idx], stage);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    if (tile < plan.begin_tile) continue;
    typename Ring::Stage& now = rings[warp_idx].stages[stage];

    products.add(p, score_scale, plan, sequence, cursor.next_seq_idx - 1, first_key, now);
    first_key += p.config.block_n;
    if (tile + 1 < min(cursor.seq_end, plan.end_tile)) {
      if constexpr (!INVARIANT) continue;
      const int32_t in_sequence = tile - cursor.seq_begin;
      if (splits_now(tile).end_behind(in_sequence) != in_sequence + 1) continue;
    }

    // ---- the end of a sequence, or of the team's part of it, or of a split: the warps' results go to the stages
    // consumed last
    const bool begins_here = cursor.seq_begin >= plan.begin_tile, ends_here = cursor.seq_end <= plan.end_tile;
    const DecodeOutput<T, Mask> output(p, plan, sequence, cursor.next_seq_idx - 1);
    // Alone, and with a sequence that nobody shares, a warp has nothing to add.
    constexpr bool CAN_BE_ALONE = Ring::k8Bit && Ring::kLooksAhead && !BESIDE && !INVARIANT;
    if constexpr (CAN_BE_ALONE) {
      const bool few_rows = sequence.all_rows <= kPagedDecodeRows / 2;
      if (num_warps == 1 && begins_here && ends_here && few_rows && p.out_scale == nullptr) {
        products.store(p, score_scale, sequence.all_rows, output);
        continue;
      }
    }
    products.finish(p, score_scale, sequence.num_rows, now, warp_sums[warp_idx]);
    team.sync();
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
      const auto partial_of = [&](int warp, float2& sums, float4& out) {
        sums = make_float2(warp_sums[warp].row_max[row], warp_sums[warp].row_sum[row]);
        out = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(&rings[warp].stages[stage]) +
                                               out_offset<HEAD_DIM>(row, group));
      };
      if (row < sequence.num_rows) {
#pragma unroll 1
        for (int w = 0; w < num_warps; w += 4) {
          float2 sums[4];
          float4 outs[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            partial_of(first_warp + min(w + i, num_warps - 1), sums[i], outs[i]);
            if (w + i >= num_warps) sums[i].x = -INFINITY;
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
    if constexpr (INVARIANT) products.begin(p);
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
  if constexpr (!BESIDE && std::is_same_v<Mask, AttentionMask>) {
    if constexpr (paged_decode_short_has(HEAD_DIM, sizeof(KV) == 1)) {
      if (p.config.cluster_log2 > 0 && paged_decode_short_fits(p))
        return launch_paged_decode_short<T, HEAD_DIM>(p, stream);
    }
    if (p.config.cluster_log2 > 0) return launch_paged_decode_cluster<T, KV, HEAD_DIM>(p, stream);
  }
  const int num_warps = p.config.num_warps * (BESIDE ? 2 : 1);
  const int smem_bytes =
      num_warps * static_cast<int>(sizeof(PagedDecodeRingWithQ<KV, HEAD_DIM>) + sizeof(DecodeRowSums));
  const auto kernel = p.config.batch_invariant ? paged_decode_kernel<T, KV, HEAD_DIM, Mask, BESIDE, true>
                                               : paged_decode_kernel<T, KV, HEAD_DIM, Mask, BESIDE, false>;
  return launch_kernel_behind(kernel, p.config.num_ctas, 32 * num_warps, smem_bytes, stream, p,
                              ScoreScale::make(p.softmax_scale, p.softcap));
}

}  // namespace fastattn
