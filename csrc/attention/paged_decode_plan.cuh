// Which keys of which sequences a team of the decode kernel takes (paged_decode.cuh has the picture). Every warp finds
// it from the lengths for itself.
#pragma once

#include <type_traits>

#include "arch/global_memory.cuh"
#include "arch/mbarrier.cuh"
#include "attention/mask.cuh"
#include "attention/paged_decode.h"

namespace fastattn {

// What memory says of one sequence's lengths. All of it is asked for here, and nothing is used, so that several
// sequences' are on their way at once.
struct DecodeLengths {
  int32_t q_start, q_end, used_q;
  int32_t used_k, k_start, k_end;  // k_start, k_end: of contiguous keys

  DecodeLengths() = default;
  __device__ __forceinline__ DecodeLengths(const PagedDecodeParams& p, int32_t seq_idx) {
    const bool packed_q = p.cu_seqlens_q != nullptr, packed_k = p.cu_seqlens_k != nullptr;
    q_start = packed_q ? load_early(p.cu_seqlens_q + seq_idx) : 0;
    q_end = packed_q ? load_early(p.cu_seqlens_q + seq_idx + 1) : p.batch_q_len;
    used_q = p.seqused_q == nullptr ? INT32_MAX : load_early(p.seqused_q + seq_idx);
    used_k = p.seqused_k == nullptr ? INT32_MAX : load_early(p.seqused_k + seq_idx);
    k_start = packed_k ? load_early(p.cu_seqlens_k + seq_idx) : 0;
    k_end = packed_k ? load_early(p.cu_seqlens_k + seq_idx + 1) : p.batch_k_len;
  }

  __device__ __forceinline__ int32_t k_len(const PagedDecodeParams& p) const {
    const int64_t most = p.paged ? static_cast<int64_t>(p.max_blocks) * p.block_size : k_end - k_start;
    return static_cast<int32_t>(min(static_cast<int64_t>(max(used_k, 0)), most));
  }
};

// Lengths of one sequence, and which keys a column's rows see: first_row and the 15 behind it.
template <typename Mask>
struct DecodeSequence {
  int32_t q_start;
  int32_t num_rows, all_rows;       // of the column: with results, and with those that get zeros
  int32_t first_token, last_token;  // of them
  Mask mask;
  KeyRange visible;  // to any row

  DecodeSequence() = default;
  __device__ __forceinline__ DecodeSequence(const PagedDecodeParams& p, int32_t seq_idx, int32_t first_row)
      : DecodeSequence(p, DecodeLengths(p, seq_idx), first_row) {}
  __device__ __forceinline__ DecodeSequence(const PagedDecodeParams& p, const DecodeLengths& lengths,
                                            int32_t first_row) {
    q_start = lengths.q_start;
    int32_t all_q_len = lengths.q_end - q_start;
    if (all_q_len > p.max_q_len) all_q_len = 0;
    const int32_t q_len = max(min(lengths.used_q, all_q_len), 0);
    num_rows = max(min(q_len * p.group_size.divisor - first_row, kPagedDecodeRows), 0);
    all_rows = max(min(all_q_len * p.group_size.divisor - first_row, kPagedDecodeRows), 0);
    first_token = p.group_size.divide(first_row);
    last_token = p.group_size.divide(first_row + max(num_rows - 1, 0));
    mask = Mask::make(p, q_len, lengths.k_len(p), q_start);
    visible = {0, 0};
    if (num_rows > 0) visible = mask.seen_by_any(first_token, last_token);
  }

  // Tiles are aligned: the first one may begin before the visible keys.
  __device__ __forceinline__ int32_t first_tile(const PagedDecodeParams& p) const {
    return visible.begin >> p.config.block_n_log2;
  }
  __device__ __forceinline__ int32_t num_tiles(const PagedDecodeParams& p) const {
    return visible.begin < visible.end ? ((visible.end - 1) >> p.config.block_n_log2) - first_tile(p) + 1 : 1;
  }
};

// Batch-invariant: how a sequence's tiles are cut into splits, of a power of two of tiles each. It follows from their
// number, and where cuts are, from the keys' positions: so with a window the first and the last one may be shorter.
struct DecodeSplits {
  int32_t first_tile;  // among all of the sequence's keys
  int32_t num_tiles;
  int32_t tiles_log2;  // of a split

  __device__ __forceinline__ DecodeSplits(const PagedDecodeParams& p, int32_t first, int32_t num)
      : first_tile(first), num_tiles(num), tiles_log2(p.config.split_tiles_log2) {
    while (num_tiles > kPagedDecodeMostSplits << tiles_log2) ++tiles_log2;
  }
  // Counted as keys are, from the first one of the sequence's on, which some may not see.
  __device__ __forceinline__ int32_t of(int32_t tile) const { return (first_tile + tile) >> tiles_log2; }
  __device__ __forceinline__ int32_t first() const { return of(0); }
  __device__ __forceinline__ int32_t last() const { return of(num_tiles - 1); }
  // Of the sequence's tiles, which are seen.
  __device__ __forceinline__ int32_t begin_of(int32_t split) const {
    return max((split << tiles_log2) - first_tile, 0);
  }
  __device__ __forceinline__ int32_t end_behind(int32_t tile) const {
    return min(((of(tile) + 1) << tiles_log2) - first_tile, num_tiles);
  }
};

// The warps that share a part: those of a CTA, or beside prompts half of them. By whole warps. Nothing is kept, since
// registers are short; and of a shuffle the compiler knows that all lanes get the same.
template <bool BESIDE>
struct DecodeTeam {
  const PagedDecodeParams& p;

  __device__ __forceinline__ int32_t of_cta() const {
    if (!BESIDE) return 0;
    return __shfl_sync(0xffffffffu, static_cast<int32_t>(threadIdx.x / 32) >= p.config.num_warps ? 1 : 0, 0);
  }
  __device__ __forceinline__ int32_t of_grid() const { return BESIDE ? 2 * blockIdx.x + of_cta() : blockIdx.x; }
  __device__ __forceinline__ int32_t first_warp() const { return of_cta() * p.config.num_warps; }  // of the CTA's
  __device__ __forceinline__ int32_t warp_idx() const { return threadIdx.x / 32 - first_warp(); }
  __device__ __forceinline__ int32_t thread_idx() const { return threadIdx.x - 32 * first_warp(); }
  __device__ __forceinline__ int32_t num_threads() const { return BESIDE ? blockDim.x / 2 : blockDim.x; }
  __device__ __forceinline__ void sync() const {
    if constexpr (BESIDE) {
      named_barrier_sync(1 + of_cta(), num_threads());
    } else {
      __syncthreads();
    }
  }
};

// Of a batch with prompts; found by whole warps.
struct DecodeMixture {
  int32_t longest = 0;       // query tokens of a sequence that is this kernel's
  int32_t prompt_tiles = 0;  // tiles of keys that take this kernel as long as a KV head's prompts the other one

  __device__ __forceinline__ explicit DecodeMixture(const PagedDecodeParams& p) {
    float pairs = 0.0f;
#pragma unroll 1
    for (int32_t seq = threadIdx.x % 32; seq < p.num_seqs; seq += 32) {
      const int32_t q_len = p.cu_seqlens_q[seq + 1] - p.cu_seqlens_q[seq];
      if (q_len <= p.max_q_len) {
        longest = max(longest, q_len);
      } else {
        const AttentionMask mask = {q_len, DecodeLengths(p, seq).k_len(p), p.window_left, p.window_right};
        const KeyRange first = mask.visible(0), last = mask.visible(q_len - 1);
        const int32_t twice_mean = max(first.end - first.begin, 0) + max(last.end - last.begin, 0);
        pairs += 0.5f * static_cast<float>(twice_mean) * static_cast<float>(q_len);
      }
    }
    longest = __reduce_max_sync(0xffffffffu, longest);
    constexpr float kMost = 1 << 25;  // so that 32 of them are an int
    const float tiles = pairs * static_cast<float>(p.group_size.divisor) /
                        (p.config.pairs_of_key * static_cast<float>(p.config.block_n));
    prompt_tiles = __reduce_add_sync(0xffffffffu, static_cast<int32_t>(fminf(tiles, kMost)));
  }
};

// A KV head and 16 of its rows.
struct DecodeColumn {
  int32_t kv_head_idx, first_row;

  DecodeColumn() = default;
  __device__ __forceinline__ DecodeColumn(const PagedDecodeParams& p, int32_t column_idx) {
    const int32_t row_tile = p.num_kv_heads_div.divide(column_idx);
    kv_head_idx = column_idx - row_tile * p.num_kv_heads;
    first_row = row_tile * kPagedDecodeRows;
  }

  // Of a row of the KV head.
  __device__ __forceinline__ int32_t head(const PagedDecodeParams& p, int32_t row) const {
    return kv_head_idx * p.group_size.divisor + p.group_size.remainder(row);
  }
};

// The tiles of a team, and where they begin; found by whole warps.
template <typename Mask>
struct DecodePlan : DecodeColumn {
  int32_t num_columns;
  int32_t column_idx, part_idx;
  int32_t tiles_per_part;
  int32_t begin_tile, end_tile;
  int32_t seq_idx;    // that has begin_tile
  int32_t seq_begin;  // its first tile

  // KEEPS_SUMS: lanes know the tiles of more than 32 sequences. Caches of 8 bits, whose teams are many, gain a tenth
  // with 512 short ones; with 16 bits the compiler makes two copies of the loader behind it: 2 to 5 % of one long
  // sequence.
  template <bool BESIDE, bool INVARIANT, bool KEEPS_SUMS>
  __device__ __forceinline__ DecodePlan(const PagedDecodeParams& p, const DecodeTeam<BESIDE>& team,
                                        std::bool_constant<INVARIANT>, std::bool_constant<KEEPS_SUMS>) {
    const int lane = threadIdx.x % 32;
    const int32_t team_idx = team.of_grid();
    int32_t num_parts = p.num_parts_div.divisor, prompt_tiles = 0;
    num_columns = p.num_columns_div.divisor;
    part_idx = p.num_columns_div.divide(team_idx);
    if constexpr (BESIDE) {
      const DecodeMixture mixture(p);
      prompt_tiles = mixture.prompt_tiles;
      // Mostly all have one token, though the host must expect more: teams of other row tiles would have nothing to do.
      if (mixture.longest * p.group_size.divisor <= kPagedDecodeRows) {
        num_parts = static_cast<int32_t>(p.config.parts_of_head);
        num_columns = p.num_kv_heads;
        part_idx = p.num_kv_heads_div.divide(team_idx);
      }
    }
    column_idx = team_idx - part_idx * num_columns;
    static_cast<DecodeColumn&>(*this) = DecodeColumn(p, column_idx);
    // Of up to 32 sequences, every lane keeps one's number of tiles. Of more, it keeps that of some 32 neighbours,
    // which are looked up again where a tile is theirs, or all are. The lengths of AT_ONCE times as many are on their
    // way together: a trip to memory for each 32 of 512 is 10 us.
    constexpr int AT_ONCE = 4;
    const auto lengths_of = [&](int32_t seq) { return DecodeLengths(p, min(seq, p.num_seqs - 1)); };
    const auto num_tiles = [&](int32_t seq, const DecodeLengths& lengths) {
      return seq < p.num_seqs ? DecodeSequence<Mask>(p, lengths, first_row).num_tiles(p) : 0;
    };
    int32_t own = 0, all_tiles = 0;
    const int32_t seqs_of_lane = (p.num_seqs + 1023) / 1024 * 32;
    if (p.num_seqs <= 32) {
      all_tiles = own = num_tiles(lane, lengths_of(lane));
    } else {
#pragma unroll 1
      for (int32_t first = 0, lane_begin = lane * seqs_of_lane; first < p.num_seqs; first += 32 * AT_ONCE) {
        DecodeLengths lengths[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) lengths[i] = lengths_of(first + 32 * i + lane);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          const int32_t tiles = num_tiles(first + 32 * i + lane, lengths[i]);
          all_tiles += tiles;
          if constexpr (KEEPS_SUMS) {
            const int32_t sum = __reduce_add_sync(0xffffffffu, tiles), behind = first + 32 * i - lane_begin;
            if (behind >= 0 && behind < seqs_of_lane) own += sum;
          }
        }
      }
    }
    all_tiles = __reduce_add_sync(0xffffffffu, all_tiles);
    if constexpr (BESIDE) {
      // The other kernel takes the SMs that this one leaves, and never leaves one. So parts are as many as end when the
      // prompts do, and a tenth of what is left, since the two disturb each other.
      const float own = static_cast<float>(all_tiles) * static_cast<float>(num_columns);
      const float others = static_cast<float>(prompt_tiles) * static_cast<float>(p.num_kv_heads);
      const float share = (own + 0.1f * others) / (own + others);
      const float wanted = share * static_cast<float>(p.config.most_teams) / static_cast<float>(num_columns);
      num_parts = max(min(static_cast<int32_t>(wanted + 0.5f), num_parts), 1);
      num_parts = __shfl_sync(0xffffffffu, num_parts, 0);  // for the compiler, as above
      tiles_per_part = (all_tiles + num_parts - 1) / num_parts;
    } else {
      tiles_per_part = p.num_parts_div.divide(all_tiles + num_parts - 1);
    }
    begin_tile = part_idx * tiles_per_part;
    end_tile = min(begin_tile + tiles_per_part, all_tiles);
    if (begin_tile >= end_tile) return;

    // The sequence that has a tile, and its first one.
    const auto find = [&](int32_t tile) {
      seq_begin = 0;
      seq_idx = 0;
      int32_t of_lane = own, seqs_each = KEEPS_SUMS && p.num_seqs > 32 ? seqs_of_lane : 1;
#pragma unroll 1
      while (true) {
        if (!KEEPS_SUMS && p.num_seqs > 32) of_lane = num_tiles(seq_idx + lane, lengths_of(seq_idx + lane));
        int32_t end = of_lane;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const int32_t below = __shfl_up_sync(0xffffffffu, end, distance);
          if (lane >= distance) end += below;
        }
        const uint32_t ends_behind = __ballot_sync(0xffffffffu, tile < seq_begin + end);
        if (ends_behind != 0) {
          const int found = __ffs(ends_behind) - 1;
          seq_idx += found * seqs_each;
          seq_begin += __shfl_sync(0xffffffffu, end - of_lane, found);
          if (seqs_each == 1) return;
          seqs_each = 1;
        } else {
          seq_idx += 32;
          seq_begin += __shfl_sync(0xffffffffu, end, 31);
        }
        if constexpr (KEEPS_SUMS) of_lane = num_tiles(seq_idx + lane, lengths_of(seq_idx + lane));
      }
    };
    if constexpr (INVARIANT) {
      // A split is the part's that has its first tile.
      int32_t seq_end = 0;
      const auto end_of_split = [&](int32_t tile) {
        find(tile);
        const DecodeSequence<Mask> sequence(p, seq_idx, first_row);
        const DecodeSplits splits(p, sequence.first_tile(p), sequence.num_tiles(p));
        seq_end = seq_begin + splits.num_tiles;
        return seq_begin + splits.end_behind(tile - seq_begin);
      };
      end_tile = end_of_split(end_tile - 1);
      if (begin_tile > 0) {
        begin_tile = end_of_split(begin_tile - 1);
        if (begin_tile == seq_end) {
          ++seq_idx;
          seq_begin = seq_end;
        }
        return;
      }
    }
    find(begin_tile);
  }
};

// Goes from sequence to sequence along a team's tiles.
template <typename Mask>
struct DecodeCursor {
  int32_t next_seq_idx;
  int32_t seq_begin = 0, seq_end;  // tiles of the sequence, also those before and behind the team's
  int32_t first_key = 0;           // of its first tile that is the team's

  __device__ __forceinline__ explicit DecodeCursor(const DecodePlan<Mask>& plan)
      : next_seq_idx(plan.seq_idx), seq_end(plan.seq_begin) {}

  __device__ __forceinline__ DecodeSequence<Mask> next(const PagedDecodeParams& p, const DecodePlan<Mask>& plan) {
    return next(p, plan, DecodeLengths(p, next_seq_idx));
  }
  __device__ __forceinline__ DecodeSequence<Mask> next(const PagedDecodeParams& p, const DecodePlan<Mask>& plan,
                                                       const DecodeLengths& lengths) {
    const DecodeSequence<Mask> sequence(p, lengths, plan.first_row);
    ++next_seq_idx;
    seq_begin = seq_end;
    seq_end += sequence.num_tiles(p);
    first_key = (sequence.first_tile(p) + max(plan.begin_tile - seq_begin, 0)) * p.config.block_n;
    return sequence;
  }
};

}  // namespace fastattn
