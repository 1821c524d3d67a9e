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

// Microseconds, about: the constants are fitted to what an H200 takes. Tiles are bound by memory, which all CTAs share,
// or by what a CTA's products wait for each other and for their stages, x among them. Where all groups have the same
// rows of tiles, four parts of each sum meet at the end.
inline double gemm_sm90_w4_some_rows_time(const GemmSm90W4SomeRowsConfig& config, int64_t k, int64_t num_sms) {
  const int cluster_size = config.num_splits * kGemmSm90W4SomeRowsSharers;
  const int64_t at_once = std::max<int64_t>(1, kClustersOnSms[cluster_size] * num_sms / 132);
  const double waves = static_cast<double>(ceil_div(config.num_ctas / cluster_size, at_once));
  const double tiles = static_cast<double>(4 * ceil_div(ceil_div(k, 256), config.num_splits));  // of a row
  const double block_m = config.block_m, others = config.num_splits - 1;
  const bool shared = config.box_tiles <= kGemmSm90W4SomeRowsGroup;
  const double read_us = (0.0305 + 0.00017 * block_m) * config.box_tiles * static_cast<double>(config.num_ctas) /
                         static_cast<double>(num_sms);
  const double wait_us = waves * (shared ? 0.115 + 0.0008 * block_m : 0.16 + 0.0009 * block_m);
  const double sums_us = (shared ? 0.016 * block_m : 0.0) + (0.5 + 0.004 * block_m) * others;
  return 7.1 + 5.9 * (waves - 1.0) + tiles * std::max(read_us, wait_us) + sums_us;
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
