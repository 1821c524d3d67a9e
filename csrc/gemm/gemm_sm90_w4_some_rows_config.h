// Tiles of the Hopper GEMM for 9 to 64 rows of x and weights of 4 bits in tiles, and the heuristic that picks one.
// Plain C++: no CUDA call.
#pragma once

#include "gemm/gemm_sm90_w4_config.h"

namespace fastattn {

constexpr int kGemmSm90W4SomeRowsTiles = 16;  // of a CTA at most, one above the other: a warp each
constexpr int kGemmSm90W4SomeRowsGroup = 4;   // of a group of warps; a CTA with no more has all groups at them
constexpr int kGemmSm90W4SomeRowsSharers =
    2;  // CTAs of a cluster that have the same columns, and bring x for each other
constexpr int kGemmSm90W4SomeRowsThreads = 32 * (kGemmSm90W4SomeRowsTiles + 1);
constexpr int kGemmSm90W4SomeRowsBlocks[] = {16, 32, 48, 64};  // rows of x

struct GemmSm90W4SomeRowsConfig {
  int block_m;
  int num_splits;  // pairs of CTAs of a cluster, which share K
  int box_tiles;   // the most rows of tiles that a CTA has
  int64_t num_ctas;
};

inline GemmSm90W4SomeRowsConfig gemm_sm90_w4_some_rows_of(int block_m, int num_splits, int64_t n, int64_t num_sms) {
  constexpr int kSharers = kGemmSm90W4SomeRowsSharers;
  const int64_t row_tiles = n / 16;
  const int64_t at_once = std::max<int64_t>(1, kClustersOnSms[num_splits * kSharers] * num_sms / 132);
  const int64_t most = kGemmSm90W4SomeRowsTiles * kSharers;
  const int64_t num_clusters = std::max(std::min(ceil_div(row_tiles, kSharers), at_once), ceil_div(row_tiles, most));
  const int64_t box_tiles = ceil_div(ceil_div(row_tiles, num_clusters), kSharers);
  return {block_m, num_splits, static_cast<int>(box_tiles), num_clusters * num_splits * kSharers};
}

// Microseconds, about: the constants are fitted to what an H200 takes. A tile of each row of a CTA is bound by memory,
// which all that are at work share, or by what its products wait for each other and for their stages, x among them.
inline double gemm_sm90_w4_some_rows_time(const GemmSm90W4SomeRowsConfig& config, int64_t k, int64_t num_sms) {
  const int cluster_size = config.num_splits * kGemmSm90W4SomeRowsSharers;
  const int64_t at_once = std::max<int64_t>(1, kClustersOnSms[cluster_size] * num_sms / 132);
  const int64_t num_clusters = config.num_ctas / cluster_size, waves = ceil_div(num_clusters, at_once);
  const double at_work =
      static_cast<double>(std::min(num_clusters, at_once) * cluster_size) / static_cast<double>(num_sms);
  const double tiles = static_cast<double>(4 * ceil_div(ceil_div(k, 256), config.num_splits));  // of a row
  const double read_us = (0.0266 + 0.00016 * config.block_m) * config.box_tiles * at_work;
  const double wait_us =
      config.box_tiles <= kGemmSm90W4SomeRowsGroup ? 0.08 + 0.00085 * config.block_m : 0.145 + 0.0011 * config.block_m;
  return 8.8 + 5.2 * static_cast<double>(waves - 1) + static_cast<double>(waves) * tiles * std::max(read_us, wait_us) +
         0.85 * (config.num_splits - 1);
}

// The best by that measure; 0 CTAs of more than 64 rows, or of as few as gemm_sm90_w4_tiles.cuh takes less time for, or
// of a weight of millions of rows.
inline GemmSm90W4SomeRowsConfig gemm_sm90_w4_some_rows_config(int64_t m, int64_t n, int64_t k, int64_t num_sms) {
  constexpr int kMostSplits = 4, kLeastRows = 9;
  GemmSm90W4SomeRowsConfig best = {};
  if (m < kLeastRows) return best;
  for (const int block_m : kGemmSm90W4SomeRowsBlocks) {
    if (block_m < m) continue;
    double best_us = 0.0;
    for (int splits = 1; splits <= std::min<int64_t>(ceil_div(k, 256), kMostSplits); ++splits) {
      const GemmSm90W4SomeRowsConfig config = gemm_sm90_w4_some_rows_of(block_m, splits, n, num_sms);
      if (!gemm_sm90_w4_can_share(config.num_ctas / (splits * kGemmSm90W4SomeRowsSharers), n / 16)) continue;
      const double us = gemm_sm90_w4_some_rows_time(config, k, num_sms);
      if (best.num_ctas != 0 && us >= best_us) continue;
      best = config;
      best_us = us;
    }
    break;
  }
  return best;
}

}  // namespace fastattn
