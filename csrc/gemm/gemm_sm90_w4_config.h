// Tiles of the Hopper GEMM for weights of 4 bits and the heuristic that picks one. Plain C++: no CUDA call.
#pragma once

#include "gemm/gemm_sm90_config.h"

namespace fastattn {

constexpr int kGemmSm90W4StageK = 256;  // columns of K: 128 bytes of a row of weight, four panels of x

// A CTA's tile in gemm_sm90_w4.cuh: so many rows of x and of weight, 64 of those to a warp group.
constexpr GemmSm90Tile kGemmSm90W4Tiles[] = {{8, 128, 2},  {16, 128, 2},  {32, 128, 2},
                                             {64, 128, 2}, {128, 128, 1}, {128, 192, 1}};
constexpr GemmSm90Tile kGemmSm90W4Fp8Tiles[] = {{16, 128, 2}, {64, 128, 2}, {128, 128, 1}};  // with x in e4m3

// And of a pair of CTAs in gemm_sm90_w4_many_rows.cuh, which share the rows of weight. Sums in two levels take twice
// the registers.
constexpr GemmSm90Tile kGemmSm90W4ManyRowsTiles[] = {{64, 256}, {128, 256}, {192, 256}, {256, 256}};
constexpr int kGemmSm90W4TwoLevelsMaxM = 128;

// Of more waves the last one is a small part, and each cluster's run of tiles loses what others leave in the L2 cache.
constexpr int64_t kGemmSm90W4StreamKWaves = 6;

// Stages of the former, in what a CTA has of 227 KiB, less 2 KiB for what is not in the ring.
constexpr int gemm_sm90_w4_stages(const GemmSm90Tile& tile, int x_bytes) {
  return (227 * 1024 / tile.ctas_per_sm - 2048) / (x_bytes * kGemmSm90W4StageK * tile.block_m + 128 * tile.block_n);
}

struct GemmSm90W4Problem {
  int64_t m;
  int64_t n;
  int64_t k;
  double weight_bits;  // of a weight, its share of the scales included
  int64_t num_sms;
  int64_t x_bytes = 2;      // of an element of x
  bool two_levels = false;  // of sums: always the kernel for many rows
  bool in_tiles = false;    // the weight, as only the kernel for many rows takes it
  bool may_tile = true;     // others may be put in tiles for it

  bool fits_many_rows() const { return in_tiles || (may_tile && n % 16 == 0 && k % 64 == 0); }
  int64_t num_pairs() const { return std::max<int64_t>(1, num_sms / 2); }  // of CTAs that run at a time
};

struct GemmSm90W4Config {
  bool many_rows;  // which kernel
  GemmSm90Tile tile;
  int num_splits;  // CTAs of a cluster, which share the K of a tile; of many rows 1
  int64_t m_tiles;
  int64_t n_tiles;
  int group_rows;  // many rows: tiles are taken column by column in groups of so many rows of tiles
  bool stream_k;   // many rows: clusters have equal shares of the stages of all tiles, not whole tiles
  int64_t num_ctas;

  // With stream_k, in the workspaces: what a CTA hands on, and a mark of each of its groups.
  int64_t num_sums() const { return stream_k ? num_ctas * tile.block_m * tile.block_n / 2 : 0; }
  int64_t num_marks() const { return stream_k ? num_ctas * 2 : 0; }
};

// All that follows from the tile.
inline void set_gemm_sm90_w4_grid(GemmSm90W4Config& config, const GemmSm90W4Problem& problem, int num_splits) {
  config.num_splits = num_splits;
  config.m_tiles = ceil_div(problem.m, config.tile.block_m);
  config.n_tiles = ceil_div(problem.n, config.tile.block_n);
  config.group_rows = 4;
  const int64_t num_tiles = config.m_tiles * config.n_tiles;
  config.num_ctas = num_tiles * num_splits;
  if (config.many_rows) {
    const int64_t shares = config.stream_k ? num_tiles * ceil_div(problem.k, kGemmSm90W4StageK) : num_tiles;
    config.num_ctas = 2 * std::min(shares, problem.num_pairs());
  }
}

// Clusters of so many CTAs that run at a time with an SM for each CTA, on a GPU of 132 SMs; dies differ in this.
constexpr int kClustersOnSms[] = {0, 132, 66, 39, 30, 22, 17, 16, 15};

// Whether clusters can share out so many rows of tiles, or blocks of them: they do by products of both, in 32 bits.
constexpr bool gemm_sm90_w4_can_share(int64_t num_clusters, int64_t num_rows) {
  return num_clusters * num_rows <= INT32_MAX;
}

// Microseconds, about: the constants are fitted to what an H200 takes, so that configurations rank as they do there. Of
// few rows the conversion bounds the kernel, and CTAs that share an SM share its time, so that the SMs with the most of
// them decide. Of many rows it overlaps with the products only in part.
inline double gemm_sm90_w4_time(const GemmSm90W4Config& config, const GemmSm90W4Problem& problem) {
  const double block_m = config.tile.block_m, block_n = config.tile.block_n;
  const double weights = static_cast<double>(problem.n) * static_cast<double>(problem.k);
  const double read_us = weights * problem.weight_bits / 8.0 / 2.75e6;
  const bool bytes = problem.x_bytes == 1;
  const double scale_bits = problem.weight_bits - 4.0;  // with x in e4m3 a scale takes as long as several weights
  if (config.many_rows) {
    const int64_t num_tiles = config.m_tiles * config.n_tiles, num_clusters = config.num_ctas / 2;
    const int64_t num_stages = ceil_div(problem.k, kGemmSm90W4StageK), waves = ceil_div(num_tiles, num_clusters);
    const int64_t most_stages = config.stream_k ? ceil_div(num_tiles * num_stages, num_clusters) : waves * num_stages;
    const double convert_us = bytes ? 0.23 + 0.1 * scale_bits : 0.115, row_us = bytes ? 0.0014 : 0.0017;
    // With all SMs at work each is slower.
    const double busy = static_cast<double>(num_clusters) / static_cast<double>(problem.num_pairs());
    const double panel_us = (convert_us + row_us * block_m) * (1.0 + 0.08 * busy);  // 128 bytes of x's rows
    const double panels = static_cast<double>(most_stages * problem.x_bytes * kGemmSm90W4StageK / 128);
    // One tile's sums go to memory, and those of all others that share a tile come from there. Over many tiles less is
    // found in the L2 cache.
    const double num_others = static_cast<double>(ceil_div(num_clusters, num_tiles));
    const double handed_us = config.stream_k ? block_m * (0.009 + 0.0095 * num_others) + 0.02 * panels * panel_us : 0.0;
    const double tiling_us = problem.in_tiles ? 0.0 : 5.0 + 2.0 * read_us;
    return tiling_us + std::max((bytes ? 6.2 : 4.2) + 2.75 * static_cast<double>(waves) + panels * panel_us + handed_us,
                                8.0 + read_us);
  }

  const int64_t num_clusters = config.m_tiles * config.n_tiles, num_splits = config.num_splits;
  const int64_t on_sms = std::max<int64_t>(1, kClustersOnSms[num_splits] * problem.num_sms / 132);
  const int64_t at_once = on_sms * config.tile.ctas_per_sm;
  const int64_t num_steps = ceil_div(ceil_div(problem.k, kGemmSm90W4StageK), num_splits);
  // Of 128 x 256 weights of a CTA alone on its SM; three groups wait less than two do.
  const double step_us =
      (bytes ? 0.38 + 1.28 * scale_bits + 0.0033 * block_m : 0.89 + 0.0066 * block_m) * (block_n == 192 ? 0.86 : 1.0);
  const int64_t full_waves = num_clusters / at_once, rest = num_clusters % at_once;
  const double turns = static_cast<double>(num_steps * (full_waves * config.tile.ctas_per_sm + ceil_div(rest, on_sms)));
  // Sums go to shared memory and come back from there, or from another SM's.
  const double sums_us = 1.5e-4 * block_m * block_n + 0.1 * static_cast<double>(num_splits - 1);
  const double more_waves = static_cast<double>(ceil_div(num_clusters, at_once) - 1);
  return 9.2 + std::max(read_us, turns * block_n / 128.0 * step_us) + sums_us + more_waves * (1.5 + sums_us);
}

// The best by that measure, over all tiles and 1 to 8 splits; of no CTAs where no kernel takes the problem.
inline GemmSm90W4Config gemm_sm90_w4_config(const GemmSm90W4Problem& problem) {
  GemmSm90W4Config best = {};
  double best_us = 0.0;
  const auto consider = [&](bool many_rows, const GemmSm90Tile& tile, int num_splits, bool stream_k = false) {
    GemmSm90W4Config config = {};
    config.many_rows = many_rows;
    config.tile = tile;
    config.stream_k = stream_k;
    set_gemm_sm90_w4_grid(config, problem, num_splits);
    const double us = gemm_sm90_w4_time(config, problem);
    if (best.num_ctas == 0 || us < best_us) {
      best = config;
      best_us = us;
    }
  };
  const int64_t num_steps = ceil_div(problem.k, kGemmSm90W4StageK);
  int64_t smaller = 0;  // the tile before it, which does for as many rows
  const auto consider_few_rows = [&](const GemmSm90Tile& tile) {
    if (tile.block_m > smaller && smaller >= problem.m) return;
    smaller = tile.block_m > smaller ? tile.block_m : smaller;
    if (tile.block_m < std::min<int64_t>(problem.m, 64)) return;
    for (int splits = 1; splits <= std::min<int64_t>(num_steps, 8); ++splits) consider(false, tile, splits);
  };
  if (!problem.in_tiles && problem.x_bytes == 2) {
    for (const GemmSm90Tile& tile : kGemmSm90W4Tiles) consider_few_rows(tile);
  } else if (!problem.in_tiles && !problem.two_levels) {
    for (const GemmSm90Tile& tile : kGemmSm90W4Fp8Tiles) consider_few_rows(tile);
  }
  if (!problem.fits_many_rows()) return best;
  for (const GemmSm90Tile& tile : kGemmSm90W4ManyRowsTiles) {
    const bool takes_registers = problem.two_levels && tile.block_m > kGemmSm90W4TwoLevelsMaxM;
    if (takes_registers) continue;
    consider(true, tile, 1);
    const int64_t num_tiles = ceil_div(problem.m, tile.block_m) * ceil_div(problem.n, tile.block_n);
    if (num_tiles <= kGemmSm90W4StreamKWaves * problem.num_pairs()) consider(true, tile, 1, true);
  }
  return best;
}

}  // namespace fastattn
