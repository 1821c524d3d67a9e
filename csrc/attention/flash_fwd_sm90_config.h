// Tiles of the Hopper attention kernel, the order in which they are taken, and the heuristic that chooses both. Plain
// C++: no CUDA call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "attention/section_order.h"

namespace fastattn {

// How one CTA is cut up; template arguments of the kernel.
struct FlashFwdSm90Tile {
  int num_consumers;  // warp groups that compute, 64 query rows each
  int block_n;        // keys per pipeline step

  constexpr int block_m() const { return 64 * num_consumers; }
  constexpr int num_threads() const { return 128 * (num_consumers + 1); }
};

// Compiled pairs of head dims, of q and k and of v; others are padded with zeros by the copy engine. In fp8 a product
// sums over 32, so that Q and K of 80 are multiplied as 96.
struct FlashFwdSm90HeadDims {
  int qk, v;
};
constexpr FlashFwdSm90HeadDims kFlashFwdSm90HeadDims[] = {{64, 64},   {80, 80},   {96, 96},  {128, 128},
                                                          {192, 128}, {192, 192}, {64, 256}, {256, 256}};
constexpr FlashFwdSm90HeadDims kFlashFwdSm90Fp8HeadDims[] = {{64, 64},   {96, 80},   {96, 96},
                                                             {128, 128}, {192, 192}, {256, 256}};
// Of K and V of 8 bits, and of packed groups.
constexpr FlashFwdSm90HeadDims kFlashFwdSm90FewHeadDims[] = {{64, 64}, {128, 128}, {256, 256}};

// Bounded by registers (O and S are fp32, block_m x v_head_dim and block_m x block_n over all consumers) and by 227 KiB
// of shared memory (Q, and at least two stages each of K and V). Three groups need fewer passes over the keys; two
// leave fewer rows of short sequences empty. Calls with extras have one tile only.
constexpr FlashFwdSm90Tile flash_fwd_sm90_tile(int v_head_dim, bool few_rows) {
  if (v_head_dim <= 64) return {3, 128};
  if (v_head_dim <= 80) return few_rows ? FlashFwdSm90Tile{2, 128} : FlashFwdSm90Tile{3, 112};
  if (v_head_dim <= 96) return few_rows ? FlashFwdSm90Tile{2, 128} : FlashFwdSm90Tile{3, 96};
  if (v_head_dim <= 128) return {2, 128};
  if (v_head_dim <= 192) return {2, 96};
  return {2, 80};
}

// Bounded by registers: P, rounded, takes a fourth of what S does. 160 keys at head dim 192, whose K and V leave place
// for one Q only, are the most that fit; extras have fewer registers left, and would spill some. There few rows are
// faster with fewer keys and two Q; up to 96 they are those that two groups hold, where a third would be idle.
constexpr int64_t flash_fwd_sm90_few_rows_fp8(int v_head_dim) { return v_head_dim <= 96 ? 128 : 2048; }
constexpr FlashFwdSm90Tile flash_fwd_sm90_tile_fp8(int v_head_dim, bool few_rows, bool extras) {
  if (v_head_dim <= 64) return {3, 128};
  if (v_head_dim <= 96) return few_rows || extras ? FlashFwdSm90Tile{2, 192} : FlashFwdSm90Tile{3, 128};
  if (v_head_dim <= 128) return {2, 192};
  if (v_head_dim <= 192) return {2, few_rows || extras ? 128 : 160};
  return {2, 96};
}

// Where a tile packs the query heads of a KV head.
constexpr FlashFwdSm90Tile flash_fwd_sm90_tile_packed(int v_head_dim) { return {2, v_head_dim <= 128 ? 128 : 80}; }

// Beside the blocks in 16 bits there are some in 8; and who widens them needs registers that three groups do not leave.
constexpr FlashFwdSm90Tile flash_fwd_sm90_tile_widened(int v_head_dim) { return {2, v_head_dim <= 128 ? 128 : 64}; }

struct FlashFwdSm90Problem {
  int64_t num_seqs;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t v_head_dim;
  int64_t max_seqlen_q;
  int64_t max_seqlen_k;
  bool causal;
  int64_t num_sms;
  int64_t packed_tokens = -1;  // all sequences' query rows where they are packed
  bool extras = false;         // flash_fwd_sm90_extras
  bool fp8 = false;
  bool widens = false;  // flash_fwd_sm90_widens
  bool mixed = false;   // short sequences are another kernel's
  // A sequence's result does not depend on the others: nor may its tile, the heads in it, or how its keys are split.
  bool batch_invariant = false;
};

// Tiles are in the order of section_order.h: pairs are of a sequence and a head that has tiles of its own, levels go
// from the last query rows to the first. Packed sequences, whose lengths only the device knows, come one after the
// other, each cut into sections of some heads.
struct FlashFwdSm90Config {
  int head_dim, v_head_dim;  // compiled head dims, 0 if there are none
  FlashFwdSm90Tile tile;
  bool packs;           // a tile has all query heads of a KV head, of as many tokens as fit
  int64_t tile_tokens;  // of a tile
  int64_t tile_heads;   // that have tiles of their own: query heads, or KV heads
  int64_t num_m_tiles;  // of a pair, at most
  SectionOrder order;
  int64_t heads_of_section;
  int num_splits;     // tiles that share the keys of the same rows
  int64_t num_tiles;  // packed: at most
  int64_t num_ctas;
};

// Compiled head dims that hold a problem's with the least padding.
template <size_t NUM>
FlashFwdSm90HeadDims flash_fwd_sm90_head_dims(const FlashFwdSm90Problem& problem,
                                              const FlashFwdSm90HeadDims (&choices)[NUM]) {
  FlashFwdSm90HeadDims best = {0, 0};
  for (const FlashFwdSm90HeadDims& dims : choices) {
    const bool fits = problem.head_dim <= dims.qk && problem.v_head_dim <= dims.v;
    if (fits && (best.qk == 0 || dims.qk + dims.v < best.qk + best.v)) best = dims;
  }
  return best;
}

// Rows that one head's tiles have for a sequence: of all tiles, full or not. Of packed sequences the length is a mean,
// and half of each last tile is empty.
inline double flash_fwd_sm90_rows(const FlashFwdSm90Problem& problem, int64_t tile_tokens, int64_t tile_rows) {
  const double tokens = static_cast<double>(tile_tokens);
  if (problem.packed_tokens >= 0 && problem.num_seqs > 0 && !problem.mixed) {
    const double mean = static_cast<double>(problem.packed_tokens) / static_cast<double>(problem.num_seqs);
    return (mean / tokens + 0.5) * static_cast<double>(tile_rows);
  }
  return static_cast<double>((problem.max_seqlen_q + tile_tokens - 1) / tile_tokens * tile_rows);
}

// A function of sizes that the host knows, never of the lengths, so that a captured CUDA graph stays valid.
inline FlashFwdSm90Config flash_fwd_sm90_config(const FlashFwdSm90Problem& problem) {
  FlashFwdSm90Config config = {};
  const int64_t group = problem.num_heads / problem.num_kv_heads;
  FlashFwdSm90HeadDims dims;
  const auto has_few_rows = [&](int64_t most) {
    return problem.max_seqlen_q <= most && !problem.extras && !problem.batch_invariant;
  };
  if (problem.fp8) {
    dims = flash_fwd_sm90_head_dims(problem, kFlashFwdSm90Fp8HeadDims);
    config.tile = flash_fwd_sm90_tile_fp8(dims.v, has_few_rows(flash_fwd_sm90_few_rows_fp8(dims.v)), problem.extras);
  } else if (problem.widens) {
    dims = flash_fwd_sm90_head_dims(problem, kFlashFwdSm90FewHeadDims);
    config.tile = flash_fwd_sm90_tile_widened(dims.v);
  } else {
    dims = flash_fwd_sm90_head_dims(problem, kFlashFwdSm90HeadDims);
    config.tile = flash_fwd_sm90_tile(dims.v, has_few_rows(1024));
    // Few rows of each head leave most of a tile empty. Packed they must save a fourth: positions of rows then take
    // divisions, and the tiles of long sequences are well filled anyway.
    const FlashFwdSm90HeadDims packed_dims = flash_fwd_sm90_head_dims(problem, kFlashFwdSm90FewHeadDims);
    const FlashFwdSm90Tile packed_tile = flash_fwd_sm90_tile_packed(packed_dims.v);
    if (group > 1 && packed_dims.qk > 0 && group <= packed_tile.block_m()) {
      const auto cost = [&](const FlashFwdSm90HeadDims& d, double rows) { return rows * (d.qk + d.v); };
      const int64_t tokens = packed_tile.block_m() / group, block_m = config.tile.block_m();
      const double packed = cost(packed_dims, flash_fwd_sm90_rows(problem, tokens, packed_tile.block_m()));
      const double plain = cost(dims, flash_fwd_sm90_rows(problem, block_m, block_m)) * static_cast<double>(group);
      // Batch-invariant, only where no decode kernel has the short ones.
      config.packs = problem.batch_invariant ? group > 32 : packed <= 0.75 * plain;
    }
    if (config.packs) {
      dims = packed_dims;
      config.tile = packed_tile;
    }
  }
  config.head_dim = dims.qk;
  config.v_head_dim = dims.v;
  config.tile_tokens = config.packs ? config.tile.block_m() / group : config.tile.block_m();
  config.tile_heads = config.packs ? problem.num_kv_heads : problem.num_heads;
  config.num_m_tiles = (problem.max_seqlen_q + config.tile_tokens - 1) / config.tile_tokens;
  const int64_t num_pairs = problem.num_seqs * config.tile_heads;
  int64_t num_whole = num_pairs * config.num_m_tiles;
  if (problem.packed_tokens >= 0) {  // each sequence has one tile that is not full, at most
    const int64_t full = problem.packed_tokens / config.tile_tokens + problem.num_seqs;
    num_whole = std::min(num_whole, full * config.tile_heads);
  }
  if (num_whole == 0) return config;

  // The keys are split as it fills the SMs best, into parts of at least four blocks; a split costs a combination.
  constexpr int64_t kMaxSplits = 32;
  const int64_t num_steps = (problem.max_seqlen_k + config.tile.block_n - 1) / config.tile.block_n;
  config.num_splits = 1;
  double best = 0.0;
  for (int64_t splits = 1; splits <= std::min(kMaxSplits, std::max<int64_t>(1, num_steps / 4)); ++splits) {
    if (splits > 1 && (num_whole >= problem.num_sms || problem.batch_invariant)) break;
    const int64_t num_waves = (num_whole * splits + problem.num_sms - 1) / problem.num_sms;
    const double time = static_cast<double>(num_waves) / static_cast<double>(splits) + (splits > 1 ? 0.05 : 0.0);
    if (splits == 1 || time < best) {
      best = time;
      config.num_splits = static_cast<int>(splits);
    }
  }
  config.num_tiles = num_whole * config.num_splits;
  config.num_ctas = std::min(config.num_tiles, problem.num_sms);

  // CTAs that run at the same time should read the same K and V. So sections are small: 2 MiB of keys and values, or
  // one KV head if that is more.
  constexpr int64_t kSectionBytes = 2 << 20;
  const int64_t kv_bytes = std::max<int64_t>(
      1, problem.max_seqlen_k * (problem.head_dim + problem.v_head_dim) * (problem.fp8 || problem.widens ? 1 : 2));
  const int64_t heads_of_kv = config.packs ? 1 : group;  // that have tiles of their own
  int64_t kv_heads = std::max<int64_t>(1, kSectionBytes / kv_bytes);
  config.order =
      SectionOrder::make(num_pairs, config.num_m_tiles, kv_heads * heads_of_kv, problem.causal, problem.num_sms);
  kv_heads = std::min(kv_heads, problem.num_kv_heads);
  while (problem.num_kv_heads % kv_heads != 0) --kv_heads;
  config.heads_of_section = kv_heads * heads_of_kv;
  return config;
}

// What a tile of packed heads reads, no other one does, if a sequence has one: with no more keys than these a sequence,
// all are so few bytes that they should leave the L2 cache as it is (as in paged_decode_config). 0: there are others.
inline int32_t flash_fwd_sm90_few_keys(const FlashFwdSm90Config& config, int64_t num_seqs, int64_t num_kv_heads,
                                       int64_t element_bytes) {
  constexpr int64_t kFewBytes = 240 << 20;
  if (config.num_tiles == 0 || !config.packs || config.num_m_tiles > 1) return 0;
  const int64_t key_bytes = num_seqs * num_kv_heads * (config.head_dim + config.v_head_dim) * element_bytes;
  return static_cast<int32_t>(kFewBytes / key_bytes);
}

}  // namespace fastattn
