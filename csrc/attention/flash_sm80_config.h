// Tiles of the sm_80 attention kernel and the heuristic that picks one. Plain C++: no CUDA call.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastattn {

// How one CTA is cut up; a template argument of the kernel by way of (head_dim, block_m).
struct FlashSm80Tile {
  int block_m;    // packed (query token, head of the group) rows
  int block_n;    // keys per pipeline step
  int num_warps;  // along the rows, 16 or 32 rows each

  constexpr int num_threads() const { return 32 * num_warps; }
};

// Compiled head dims; others are padded with zeros in shared memory to the next one.
constexpr int kFlashSm80HeadDims[] = {64, 96, 128, 192, 256};

// All of them stay within the 99 KiB of shared memory of sm_86.
constexpr FlashSm80Tile flash_sm80_tile(int head_dim) {
  if (head_dim == 64) return {128, 128, 4};
  if (head_dim <= 128) return {128, 64, 4};
  return {64, 64, 4};
}

struct FlashSm80Problem {
  int64_t num_seqs;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;  // capacity (max_blocks * block_size) of a paged cache: lengths are not known
  int64_t num_sms;
  bool batch_invariant = false;  // a sequence's result does not depend on the others: keys are not split
};

struct FlashSm80Config {
  int head_dim;  // compiled head dim, 0 if there is none
  FlashSm80Tile tile;
  int64_t num_m_tiles;
  int num_splits;  // CTAs that share the keys of one tile
};

// A function of sizes that the host knows, never of the lengths, so that a captured CUDA graph stays
// valid while sequences grow.
inline FlashSm80Config flash_sm80_config(const FlashSm80Problem& problem) {
  constexpr int64_t kMaxSplits = 32;
  constexpr int64_t kMinStepsPerSplit = 4;

  FlashSm80Config config = {};
  for (int head_dim : kFlashSm80HeadDims) {
    if (config.head_dim == 0 && problem.head_dim <= head_dim) config.head_dim = head_dim;
  }
  const int64_t rows = problem.max_seqlen_q * (problem.num_heads / problem.num_kv_heads);
  config.tile = flash_sm80_tile(config.head_dim);
  config.num_m_tiles = (rows + config.tile.block_m - 1) / config.tile.block_m;

  // Split the keys when there is less than one CTA per SM, up to about two, but leave every split
  // some steps of work at full length.
  const int64_t num_ctas = config.num_m_tiles * problem.num_kv_heads * problem.num_seqs;
  int64_t num_splits = 1;
  if (num_ctas > 0 && num_ctas < problem.num_sms && !problem.batch_invariant) {
    const int64_t keys_per_split = kMinStepsPerSplit * config.tile.block_n;
    num_splits = std::min(
        {2 * problem.num_sms / num_ctas, kMaxSplits, (problem.max_seqlen_k + keys_per_split - 1) / keys_per_split});
  }
  config.num_splits = static_cast<int>(std::max<int64_t>(num_splits, 1));
  return config;
}

}  // namespace fastattn
