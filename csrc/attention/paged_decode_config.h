// Tiles of the decode kernel and the heuristic that sizes its grid. Plain C++: no CUDA call.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastattn {

// Compiled head dims; others are padded with zeros in shared memory to the next one.
constexpr int kPagedDecodeHeadDims[] = {64, 96, 128, 192, 256};
constexpr bool paged_decode_has_8bit(int head_dim) { return head_dim == 64 || head_dim == 128 || head_dim == 256; }

// Packed rows (query token, head of the group) of a CTA: one product of the tensor cores.
constexpr int kPagedDecodeRows = 16;

// Row tiles of a KV head read the same keys at the same time, the second from the L2 cache. With more of them a kernel
// with larger tiles is better; with two already over pages, where rows are long and it packs the heads of a group.
constexpr int kPagedDecodeRowTiles = 2;

// CTAs of a cluster at most: all GPUs that have clusters take those.
constexpr int kPagedDecodeMostClusterLog2 = 3;

// The kernel for few rows and few keys (paged_decode_short.cuh): its head dims, rows and warps.
constexpr bool paged_decode_short_has(int head_dim, bool is_8bit) {
  return !is_8bit && (head_dim == 64 || head_dim == 128);
}
constexpr int kPagedDecodeShortRows = 8;
constexpr int kPagedDecodeShortWarps = 8;

// Query tokens of a sequence that are as many rows.
constexpr int64_t paged_decode_most_tokens(int64_t group_size) {
  return kPagedDecodeRowTiles * kPagedDecodeRows / group_size;
}

// Of a tile, for one warp. Rows of few bytes come faster, and with fewer instructions, 32 at a time.
constexpr int paged_decode_warp_keys(int head_dim, bool is_8bit) { return is_8bit || head_dim == 64 ? 32 : 16; }

// Neighbouring keys, from a multiple of it on, whose rows lie at equal distances in pages of a multiple of it, and
// outside: so one address and a multiplication for each find them all.
constexpr int kPagedDecodeEvenRows = 16;

// Stages of a warp's ring, of its keys and values of one tile each; follow from the compiled head dim. One of them is
// consumed, so that an SM of Hopper has 64 or 96 KiB in flight, twice what the memory brings it in a microsecond and
// more; with still more they only wait in queues.
constexpr int paged_decode_stages(int head_dim, bool is_8bit) {
  return head_dim == 128 || head_dim == 256 || (head_dim == 64 && !is_8bit) ? 2 : 3;
}

// In a cluster one more, since half of the SMs must bring what all do elsewhere. Not of 8 bits, which take longer to
// multiply.
constexpr int paged_decode_cluster_stages(int head_dim, bool is_8bit) {
  return paged_decode_stages(head_dim, is_8bit) + (is_8bit ? 0 : 1);
}

// Warps of a CTA that has an SM of Hopper to itself. A CTA of half as many is for GPUs with less shared memory (82 KiB
// is within the limit of sm_86); Hopper holds two of those an SM. Beside prompts, which fit beside none, these two are
// the teams of one CTA, so that the other SMs stay empty.
constexpr int paged_decode_max_warps(int head_dim) { return head_dim <= 128 ? 8 : 4; }

// Batch-invariant: keys of a split, the unit that a part takes whole. Longer sequences than so many splits hold have
// splits of twice as many keys, and so on: who ends one has to add them all up, from a workspace that holds them.
constexpr int paged_decode_split_keys(bool is_8bit) { return is_8bit ? 512 : 256; }
constexpr int kPagedDecodeMostSplits = 32;

struct PagedDecodeProblem {
  int64_t num_seqs;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;  // of q and k or of v, whichever is larger
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;  // capacity (max_blocks * block_size) of a paged cache: lengths are not known
  int64_t num_sms;
  bool large_smem;               // 227 KiB of shared memory for a CTA, as on Hopper
  bool is_8bit = false;          // K and V
  bool beside_prompts = false;   // which the Hopper kernel computes at the same time
  bool batch_invariant = false;  // a sequence's result does not depend on the others
  bool has_tree = false;
};

struct PagedDecodeConfig {
  bool fits;      // whether the kernel can take the call
  int head_dim;   // compiled head dim
  int num_warps;  // of a team: the warps that share a part
  int block_n;    // keys of a tile, of all warps; a power of two
  int block_n_log2;
  int64_t num_row_tiles;  // of a KV head
  int64_t num_columns;    // KV heads times row tiles
  int64_t max_tiles;      // of a column, where every cache is full
  int64_t num_parts;      // teams of a column
  int64_t num_teams;
  int64_t num_ctas;
  bool beside_prompts;    // then a CTA has two teams, else one; and num_parts and num_teams are at most
  int64_t parts_of_head;  // num_parts where no sequence has more than one row tile; used beside prompts
  float pairs_of_key;  // of a prompt's row and a key, that an SM computes while another one reads a key and its value
  int32_t most_teams;  // that all SMs hold
  int32_t few_tiles;   // where a part has no more, the call reads so little that it should leave the L2 cache as it is
  bool batch_invariant;
  int32_t split_tiles_log2;  // batch-invariant: of the shortest split
  // A team has two areas of so many slots in the workspace, a slot for results of so many rows.
  int32_t slots_of_area;
  int32_t rows_of_slot;  // and in clusters, which have no slots, all rows of a KV head
  int32_t cluster_log2;  // above 0: a sequence's column is a cluster's of so many CTAs (paged_decode_cluster.cuh)
};

// A function of sizes that the host knows: who takes which keys, the kernel derives from the lengths, so that a
// captured CUDA graph stays valid, and balanced, while sequences grow.
inline PagedDecodeConfig paged_decode_config(const PagedDecodeProblem& problem) {
  constexpr int64_t kFewSequences = 8;
  constexpr int64_t kFewBytes = 240 << 20;
  constexpr int64_t kManyPairs = 12;
  PagedDecodeConfig config = {};
  for (int head_dim : kPagedDecodeHeadDims) {
    if (config.head_dim == 0 && problem.head_dim <= head_dim && (!problem.is_8bit || paged_decode_has_8bit(head_dim))) {
      config.head_dim = head_dim;
    }
  }
  const int64_t rows = problem.max_seqlen_q * (problem.num_heads / problem.num_kv_heads);
  config.num_row_tiles = (rows + kPagedDecodeRows - 1) / kPagedDecodeRows;
  config.num_columns = problem.num_kv_heads * config.num_row_tiles;
  const bool few_row_tiles =
      config.num_row_tiles <= kPagedDecodeRowTiles;  // more only where no other kernel reads K and V
  if (config.head_dim == 0 || config.num_columns == 0 || (!few_row_tiles && !problem.is_8bit)) return config;

  const int max_warps = paged_decode_max_warps(config.head_dim);
  const auto use = [&](int num_warps) {
    config.num_warps = num_warps;
    config.block_n = num_warps * paged_decode_warp_keys(config.head_dim, problem.is_8bit);
    config.block_n_log2 = 0;
    while (1 << config.block_n_log2 < config.block_n) ++config.block_n_log2;
    config.max_tiles =
        problem.num_seqs * std::max<int64_t>(1, (problem.max_seqlen_k + config.block_n - 1) / config.block_n);
    config.most_teams = static_cast<int32_t>(problem.num_sms * max_warps / num_warps);
    config.num_parts = std::min(config.max_tiles, std::max<int64_t>(1, config.most_teams / config.num_columns));
    config.num_teams = config.num_ctas = config.num_parts * config.num_columns;
    config.parts_of_head = config.num_parts;
  };
  // Batch-invariant, the tile is that of small CTAs, which every GPU and every batch can have.
  // Where a sequence has many parts, large CTAs mean fewer of them to add up. Small ones waste less at the ends of many
  // sequences, and leave fewer SMs empty where keys are few or the number of columns is unfortunate.
  use(max_warps);
  const bool few_ctas = config.num_teams * 10 < problem.num_sms * 9;
  const bool many_sequences = problem.num_seqs > kFewSequences && config.head_dim <= 128;
  if (problem.beside_prompts) {
    // Four SMs of five bring all that the memory has, unless they must also widen it.
    use(max_warps / 2);
    const int64_t kv_heads = problem.num_kv_heads, wanted = config.most_teams * (problem.is_8bit ? 19 : 16) / 20;
    config.beside_prompts = true;
    config.pairs_of_key = problem.is_8bit ? 55.0f : 100.0f;
    config.parts_of_head = std::max<int64_t>(1, std::min(config.max_tiles, (wanted + kv_heads / 2) / kv_heads));
    config.num_teams = std::max(config.parts_of_head * kv_heads, config.num_columns);
    config.num_parts = config.num_teams / config.num_columns;
    config.num_ctas = (config.num_teams + 1) / 2;
  } else if (!problem.large_smem || few_ctas || many_sequences || problem.batch_invariant) {
    use(max_warps / 2);
    // With more sequences still, what is done at the end of each of them is a large part: the fewer warps share it,
    // the more sequences end at the same time. With 16 bits the longer ones are up to 2 % slower so.
    const int64_t pairs = problem.num_seqs * config.num_columns, small_teams = 2 * problem.num_sms;
    const bool one_half = rows <= kPagedDecodeRows / 2 && !problem.batch_invariant && !problem.has_tree;
    if (problem.large_smem && one_half && problem.is_8bit && config.head_dim <= 128) {
      if (pairs >= kManyPairs * small_teams) {
        use(1);
      } else if (2 * pairs >= 7 * small_teams) {
        use(2);
      }
    }
  }

  config.rows_of_slot = kPagedDecodeRows;
  config.slots_of_area = config.parts_of_head > 1 ? 1 : 0;
  if (problem.batch_invariant) {
    const int64_t split_tiles = paged_decode_split_keys(problem.is_8bit) / config.block_n;
    while (1 << config.split_tiles_log2 < split_tiles) ++config.split_tiles_log2;
    // One more, since a window may begin within one.
    const int64_t num_splits = (config.max_tiles / problem.num_seqs + split_tiles - 1) / split_tiles;
    config.batch_invariant = true;
    config.rows_of_slot = static_cast<int32_t>(std::min<int64_t>(rows, kPagedDecodeRows));
    config.slots_of_area =
        num_splits > 1 ? static_cast<int32_t>(std::min<int64_t>(num_splits, kPagedDecodeMostSplits)) + 1 : 0;
  }

  // Few sequences. Clusters of more than two are laid out on half of the SMs, since GPCs differ in theirs, and what
  // does not fit is a second wave. A CTA takes no more keys, since lengths may differ, and nobody shares them (of eight
  // sequences, one of 4,096 keys and the others of 100, with 2,048 keys a CTA it took 25.6 us for 19.5); unless there
  // is one sequence, of 16 bits, and SMs enough to read it as fast as all of them.
  const int64_t most_cluster_keys = problem.num_seqs <= 2 ? 2048 : 1024;
  if (problem.large_smem && config.num_row_tiles == 1 && !problem.beside_prompts && !problem.batch_invariant &&
      !problem.has_tree) {
    const int64_t num_pairs = problem.num_seqs * config.num_columns;
    const int64_t small_keys = max_warps / 2 * paged_decode_warp_keys(config.head_dim, problem.is_8bit);
    const auto fits = [&](int32_t log2) { return num_pairs << log2 <= problem.num_sms / (log2 > 1 ? 2 : 1); };
    int32_t log2 = 0;
    while (log2 < kPagedDecodeMostClusterLog2 && fits(log2 + 1) && small_keys << log2 < problem.max_seqlen_k) ++log2;
    const bool is_alone = problem.num_seqs == 1 && !problem.is_8bit && (num_pairs << log2) * 5 >= problem.num_sms * 2;
    if (log2 > 0 && (is_alone || problem.max_seqlen_k <= most_cluster_keys << log2)) {
      use(small_keys << log2 >= problem.max_seqlen_k ? max_warps / 2 : max_warps);
      config.cluster_log2 = log2;
      config.num_parts = config.parts_of_head = problem.num_seqs << log2;
      config.num_teams = config.num_ctas = num_pairs << log2;
      config.slots_of_area = 0;
      config.rows_of_slot = static_cast<int32_t>(rows);
    }
  }

  // Many row tiles are to find in the L2 cache what others have read a while ago.
  const int64_t tile_bytes = config.block_n * config.head_dim * (problem.is_8bit ? 2 : 4);
  const int64_t num_readers = std::max<int64_t>(1, config.parts_of_head * problem.num_kv_heads);
  if (few_row_tiles) config.few_tiles = static_cast<int32_t>(kFewBytes / (tile_bytes * num_readers));

  // Tiles and slots are counted in 32 bits.
  config.fits = config.max_tiles < INT32_MAX / 2 && config.num_ctas < INT32_MAX / 2 &&
                2 * config.num_teams * config.slots_of_area < INT32_MAX;
  return config;
}

}  // namespace fastattn
