// Tiles of the sm_80 attention backward and what depends on them. Plain C++: no CUDA call.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastattn {

// How one CTA of 8 warps is cut up; a template argument of the kernel by way of (head_dim, large).
struct FlashBwdSm80Tile {
  int block_m;     // queries of a step
  int block_n;     // keys a CTA owns
  int s_warps_m;   // S and dP (queries x keys): warps along the queries, the others along the keys
  int kv_warps_n;  // dK and dV (keys x dims): warps along the keys, the others along the dims
  int dq_warps_m;  // dQ (queries x dims): warps along the queries, the others along the dims
};

constexpr int kFlashBwdSm80Warps = 8;
constexpr int kFlashBwdSm80Threads = 32 * kFlashBwdSm80Warps;

// Compiled head dims; others, and V's own, are padded with zeros in shared memory to the next one.
constexpr int kFlashBwdSm80HeadDims[] = {64, 96, 128, 192, 256};

// Shared memory that a CTA needs at least.
constexpr int64_t kFlashBwdSm80SharedMemory = 160 * 1024;

// `large`: where a CTA may have more than the 163 KiB of sm_80; differs at 256 only.
constexpr FlashBwdSm80Tile flash_bwd_sm80_tile(int head_dim, bool large) {
  if (head_dim == 64) return {128, 128, 4, 4, 4};
  if (head_dim == 96) return {64, 128, 2, 4, 4};
  if (head_dim == 128) return {64, 128, 2, 4, 2};
  if (head_dim == 192) return {64, 64, 4, 2, 2};
  if (large) return {64, 64, 4, 2, 2};
  return {32, 64, 2, 2, 2};
}

// Shared memory of a CTA: K and V, two stages of Q and dO, P and dS. FlashBwdSm80Storage is held against it.
constexpr int64_t flash_bwd_sm80_smem_bytes(int head_dim, bool large) {
  const FlashBwdSm80Tile tile = flash_bwd_sm80_tile(head_dim, large);
  return 4 * (head_dim * (tile.block_n + 2 * tile.block_m) + tile.block_m * tile.block_n);
}

// The kernel that computes dQ alone, for `deterministic`: a CTA owns block_m queries, 16 a warp.
struct FlashBwdSm80DqTile {
  int block_m;
  int block_n;  // keys of a step

  constexpr int num_threads() const { return block_m * 2; }
};

constexpr FlashBwdSm80DqTile flash_bwd_sm80_dq_tile(int head_dim) {
  if (head_dim <= 128) return {128, 64};
  if (head_dim == 192) return {64, 64};
  return {64, 32};
}

struct FlashBwdSm80Problem {
  int64_t num_seqs;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;    // the larger of q's and v's
  int64_t num_tokens;  // queries in all
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  bool packed;  // sequences of their own lengths one behind the other
  bool deterministic;
  int64_t shared_memory;  // bytes that a CTA may have
  int64_t num_sms;
};

struct FlashBwdSm80Config {
  int head_dim;  // compiled head dim, 0 if there is none
  bool large;
  FlashBwdSm80Tile tile;
  FlashBwdSm80DqTile dq_tile;
  int64_t num_m_blocks;     // of the longest sequence
  int64_t num_n_blocks;     // the same
  int64_t num_dq_m_blocks;  // of the kernel for dQ alone
  int32_t num_splits;       // CTAs that share the heads of a group, for one block of keys
  int32_t heads_per_split;
  int32_t pairs_per_section;  // (KV head, split, sequence) whose CTAs are started together, see flash_bwd_sm80.cuh
  int64_t padded_tokens;      // rows of the workspaces: every sequence begins at a multiple of block_m
  int64_t dq_accum_size;      // elements of that workspace; 0 if deterministic
};

// A function of sizes that the host knows.
inline FlashBwdSm80Config flash_bwd_sm80_config(const FlashBwdSm80Problem& problem) {
  FlashBwdSm80Config config = {};
  for (int head_dim : kFlashBwdSm80HeadDims) {
    if (config.head_dim == 0 && problem.head_dim <= head_dim) config.head_dim = head_dim;
  }
  config.large = config.head_dim == 256 && problem.shared_memory > 163 * 1024;
  config.tile = flash_bwd_sm80_tile(config.head_dim, config.large);
  config.dq_tile = flash_bwd_sm80_dq_tile(config.head_dim);
  const auto blocks = [](int64_t length, int64_t block) { return (length + block - 1) / block; };
  const int block_m = config.tile.block_m;
  config.num_m_blocks = blocks(problem.max_seqlen_q, block_m);
  config.num_n_blocks = blocks(problem.max_seqlen_k, config.tile.block_n);
  config.num_dq_m_blocks = blocks(problem.max_seqlen_q, config.dq_tile.block_m);

  // Split the heads of a group where there are less than two CTAs an SM; and no CTA has more than four, since with a
  // causal mask CTAs fall out of step, and what each of them reads would no longer be in the L2 cache for the others.
  const int64_t group_size = problem.num_heads / problem.num_kv_heads;
  const int64_t num_ctas = config.num_n_blocks * problem.num_kv_heads * problem.num_seqs;
  const int64_t wanted = num_ctas > 0 ? std::min(blocks(2 * problem.num_sms, num_ctas), group_size) : 1;
  config.heads_per_split = static_cast<int32_t>(std::min<int64_t>(blocks(group_size, wanted), 4));
  config.num_splits = static_cast<int32_t>(blocks(group_size, config.heads_per_split));
  config.pairs_per_section = 16;

  config.padded_tokens = problem.packed ? (problem.num_tokens + problem.num_seqs * block_m) / block_m * block_m
                                        : problem.num_seqs * config.num_m_blocks * block_m;
  config.dq_accum_size = problem.deterministic ? 0 : problem.num_heads * config.padded_tokens * config.head_dim;
  return config;
}

}  // namespace fastattn
