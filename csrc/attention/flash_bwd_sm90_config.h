// Tiles of the Hopper attention gradient and the order in which they are taken. Plain C++: no CUDA call.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/section_order.h"

namespace fastattn {

// How one CTA is cut up; template arguments of the kernel by way of the head dim.
struct FlashBwdSm90Tile {
  int block_m;  // query rows per pipeline step
  int block_n;  // keys that a CTA gives the gradients of
};

// Compiled head dims; others are padded with zeros by the copy engine to the next one.
constexpr int kFlashBwdSm90HeadDims[] = {64, 96, 128, 192, 256};

// Bounded by registers: dK and dV, block_n x head_dim, and S and dP, block_n x block_m, are fp32 in two warp groups.
// With 64 keys one group computes S and the other dP, and they exchange P and dS.
constexpr FlashBwdSm90Tile flash_bwd_sm90_tile(int head_dim) {
  return head_dim <= 128 ? FlashBwdSm90Tile{64, 128} : FlashBwdSm90Tile{64, 64};
}

// How often shared memory has a step's Q, dO and dS, and a tile's K.
struct FlashBwdSm90Stages {
  int q, dout, ds, k;
};

constexpr FlashBwdSm90Stages flash_bwd_sm90_stages(int head_dim) {
  if (head_dim <= 128) return {3, 2, 2, 2};
  return head_dim <= 192 ? FlashBwdSm90Stages{3, 2, 1, 1} : FlashBwdSm90Stages{2, 2, 1, 1};
}

// Shared memory that a CTA asks for: FlashBwdSm90Storage, which the launch holds against this, and what aligns it.
constexpr int64_t flash_bwd_sm90_smem_bytes(int head_dim) {
  const FlashBwdSm90Tile tile = flash_bwd_sm90_tile(head_dim);
  const FlashBwdSm90Stages stages = flash_bwd_sm90_stages(head_dim);
  const int num_scores = stages.ds + (tile.block_n == 64);  // P too is there where groups share the keys
  const int64_t num_elements = head_dim * (tile.block_m * (stages.q + stages.dout) + tile.block_n * (stages.k + 1)) +
                               tile.block_m * tile.block_n * num_scores;
  constexpr int64_t kRowsAndBarriers = 2048, kAlignment = 1024;
  return 2 * num_elements + kRowsAndBarriers + kAlignment;
}

// Columns of a row that lie side by side in shared memory.
FASTATTN_HOST_DEVICE constexpr int flash_bwd_sm90_panel(int head_dim) { return head_dim % 64 == 0 ? 64 : 32; }

// Where two groups share the columns out, each has whole panels, and of an odd one half: which is a group's i-th?
FASTATTN_HOST_DEVICE constexpr int flash_bwd_sm90_column(int head_dim, int group, int i) {
  const int half = head_dim / 2 % flash_bwd_sm90_panel(head_dim), whole = head_dim / 2 - half;
  return i < whole ? group * whole + i : whole + group * half + i;
}

struct FlashBwdSm90Problem {
  int64_t num_seqs;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;  // the larger one of QK's and V's
  int64_t q_tokens;  // Sq, packed T
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  bool packed;
  bool causal;
  int64_t num_sms;
};

// Tiles are in the order of section_order.h: pairs are of a sequence and a KV head, levels go from the first keys,
// which with a causal mask most queries see, to the last.
struct FlashBwdSm90Config {
  int head_dim;  // compiled head dim, 0 if there is none
  FlashBwdSm90Tile tile;
  int64_t num_n_tiles;  // of a pair
  SectionOrder order;
  bool heads_last;  // a tile takes all heads' rows of a block before it goes on, and tiles go up and down in turns
  int64_t num_tiles;
  int64_t num_ctas;
  // Query rows are kept in blocks of block_m in the workspaces, each sequence beginning with a new one.
  int64_t blocks_of_seq;   // of the longest sequence
  int64_t blocks_of_head;  // of all sequences

  int64_t rows(int64_t num_heads) const { return num_heads * blocks_of_head * tile.block_m; }
};

// Which kernel, if a call does not say: where tiles are few, flash_bwd_sm80 shares out the heads of a group, which this
// one has no way to.
inline bool flash_bwd_sm90_is_better(const FlashBwdSm90Problem& problem) {
  if (problem.num_heads == problem.num_kv_heads) return true;
  const int block_n = flash_bwd_sm90_tile(static_cast<int>(problem.head_dim)).block_n;
  const int64_t num_n_tiles = (problem.max_seqlen_k + block_n - 1) / block_n;
  return 3 * problem.num_seqs * problem.num_kv_heads * num_n_tiles >= problem.num_sms;
}

// A function of sizes that the host knows, never of the lengths, so that a captured CUDA graph stays valid.
inline FlashBwdSm90Config flash_bwd_sm90_config(const FlashBwdSm90Problem& problem) {
  FlashBwdSm90Config config = {};
  for (int head_dim : kFlashBwdSm90HeadDims) {
    if (config.head_dim == 0 && problem.head_dim <= head_dim) config.head_dim = head_dim;
  }
  config.tile = flash_bwd_sm90_tile(config.head_dim);
  const int64_t block_m = config.tile.block_m;
  config.blocks_of_seq = (problem.max_seqlen_q + block_m - 1) / block_m;
  // Packed: sequence b begins at block cu_seqlens_q[b] / block_m + b.
  config.blocks_of_head =
      problem.packed ? problem.q_tokens / block_m + problem.num_seqs : problem.num_seqs * config.blocks_of_seq;
  config.num_n_tiles = (problem.max_seqlen_k + config.tile.block_n - 1) / config.tile.block_n;
  const int64_t num_pairs = problem.num_seqs * problem.num_kv_heads;
  config.num_tiles = num_pairs * config.num_n_tiles;
  if (config.num_tiles == 0) return config;
  config.num_ctas = std::min(config.num_tiles, problem.num_sms);

  // CTAs that run at the same time should read the same Q and dO and add to the same dQ: sections of 16 MiB of those,
  // or one pair if that is more.
  constexpr int64_t kSectionBytes = 16 << 20;
  const int64_t group = problem.num_heads / problem.num_kv_heads;
  const int64_t pair_bytes = std::max<int64_t>(1, problem.max_seqlen_q * config.head_dim * 8 * group);
  int64_t pairs = std::max<int64_t>(1, kSectionBytes / pair_bytes);
  // The heads of a group multiply that, and with a causal mask tiles get out of step: together they then read from
  // memory what none would alone. So a tile takes all heads' rows of a block before it goes on, and tiles go two ways.
  // Those that begin together do so from the last rows on, which all of them see. They end one after the other, the
  // last keys' first; what begins then, the first keys' first, meets if it goes from the first rows on, and ends
  // together. So a section has as many tiles as there are CTAs, every CTA's tiles go up and down in turns, and two
  // sections end as they began.
  const int64_t pairs_at_once = std::max<int64_t>(1, problem.num_sms / config.num_n_tiles);
  constexpr int64_t kCachedBytes = 40 << 20;  // of an L2 cache of 50 MiB
  config.heads_last =
      problem.causal && group > 1 && pairs_at_once * pair_bytes > kCachedBytes && num_pairs % (2 * pairs_at_once) == 0;
  if (config.heads_last) pairs = pairs_at_once;
  config.order =
      SectionOrder::make(num_pairs, config.num_n_tiles, pairs, problem.causal && !config.heads_last, problem.num_sms);
  return config;
}

}  // namespace fastattn
