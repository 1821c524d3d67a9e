// Shapes of the Hopper GEMM for few rows of x and weights of 4 bits in tiles, and the heuristic that picks one. Plain
// C++: no CUDA call.
#pragma once

#include "gemm/gemm_sm90_w4_config.h"

namespace fastattn {

// Up to block_m rows of x. Of the weight row_tiles tiles, one above the other, are a block, which a warp multiplies at
// a time. A CTA may have max_blocks of them, and of x as many columns in shared memory as pass_tiles tiles have.
struct GemmSm90W4TilesShape {
  int block_m;
  int row_tiles;
  int pass_tiles;
  int max_blocks;
};
constexpr GemmSm90W4TilesShape kGemmSm90W4TilesShapes[] = {{8, 1, 112, 16}, {16, 2, 56, 8}};
constexpr int kMostRowsOfFours = 16;  // of x in 16 bits, with tiles in order 8

struct GemmSm90W4TilesConfig {
  GemmSm90W4TilesShape shape;
  int num_splits;  // CTAs of a cluster, which share K
  int64_t num_ctas;
};

inline GemmSm90W4TilesConfig gemm_sm90_w4_tiles_of(const GemmSm90W4TilesShape& shape, int num_splits, int64_t n,
                                                   int64_t num_sms) {
  const int64_t num_blocks = ceil_div(n, 16 * shape.row_tiles);
  const int64_t at_once = std::max<int64_t>(1, kClustersOnSms[num_splits] * num_sms / 132);
  const int64_t num_clusters = std::max(std::min(num_blocks, at_once), ceil_div(num_blocks, shape.max_blocks));
  return {shape, num_splits, num_clusters * num_splits};
}

// Microseconds, about, as an H100 takes them: of what the SM with most of the work reads, and what there is beside
// that.
inline double gemm_sm90_w4_tiles_time(const GemmSm90W4TilesConfig& config, int64_t m, int64_t n, int64_t k,
                                      int64_t num_sms) {
  const GemmSm90W4TilesShape& shape = config.shape;
  const int64_t num_clusters = config.num_ctas / config.num_splits;
  const int64_t at_once = std::max<int64_t>(1, kClustersOnSms[config.num_splits] * num_sms / 132);
  const int64_t waves = ceil_div(num_clusters, at_once), columns = ceil_div(k / 64, config.num_splits);
  const int64_t tiles = ceil_div(ceil_div(n, 16 * shape.row_tiles), num_clusters) * shape.row_tiles * columns;
  const double weight_us = 0.025 * static_cast<double>(tiles), x_us = 0.0025 * static_cast<double>(m * columns);
  const double passes_us = 1.5 * static_cast<double>(ceil_div(columns, shape.pass_tiles) - 1);
  const double splits_us = 0.5 * static_cast<double>(config.num_splits - 1);
  return 8.7 + static_cast<double>(waves) * (weight_us + x_us + passes_us + splits_us + 1.0);
}

// The smallest shape for so many rows, and the best split by that measure. 0 CTAs if no shape has so many, or of a
// weight of millions of rows.
inline GemmSm90W4TilesConfig gemm_sm90_w4_tiles_config(int64_t m, int64_t n, int64_t k, int64_t num_sms) {
  constexpr int64_t kMostSplits = 4;  // larger clusters leave SMs over
  GemmSm90W4TilesConfig best = {};
  for (const GemmSm90W4TilesShape& shape : kGemmSm90W4TilesShapes) {
    if (shape.block_m < m) continue;
    double best_us = 0.0;
    for (int splits = 1; splits <= std::min<int64_t>(k / 64, kMostSplits); ++splits) {
      const GemmSm90W4TilesConfig config = gemm_sm90_w4_tiles_of(shape, splits, n, num_sms);
      if (!gemm_sm90_w4_can_share(config.num_ctas / splits, ceil_div(n, 16 * shape.row_tiles))) continue;
      const double us = gemm_sm90_w4_tiles_time(config, m, n, k, num_sms);
      if (best.num_ctas != 0 && us >= best_us) continue;
      best = config;
      best_us = us;
    }
    break;
  }
  return best;
}

}  // namespace fastattn
