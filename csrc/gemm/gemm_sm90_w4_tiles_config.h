// Shapes of the Hopper GEMM for few rows of x and weights of 4 bits in tiles, and the heuristic that picks one. Plain
// C++: no CUDA call.
#pragma once

#include "gemm/gemm_sm90_w4_config.h"

namespace fastattn {

// Rows of x and tiles of weight that a warp multiplies at a time, one above the other, which share what is read of x.
struct GemmSm90W4TilesShape {
  int block_m;
  int row_tiles;
};
constexpr GemmSm90W4TilesShape kGemmSm90W4TilesShapes[] = {{8, 1}, {16, 2}, {32, 2}};

// Columns of x that are in shared memory at a time, 64 KiB of it; and blocks of row_tiles tiles that a CTA may have.
constexpr int gemm_sm90_w4_tiles_pass(int block_m) { return 512 / block_m; }  // tiles of columns
constexpr int gemm_sm90_w4_tiles_max_blocks(int row_tiles) { return 16 / row_tiles; }

struct GemmSm90W4TilesConfig {
  GemmSm90W4TilesShape shape;
  int num_splits;  // CTAs of a cluster, which share K
  int64_t num_ctas;

  // What a CTA has, at most: blocks of rows, and tiles of columns.
  int64_t num_blocks(int64_t n) const { return ceil_div(ceil_div(n, 16 * shape.row_tiles), num_ctas / num_splits); }
  int64_t num_columns(int64_t k) const { return ceil_div(k / 64, num_splits); }
};

inline GemmSm90W4TilesConfig gemm_sm90_w4_tiles_of(const GemmSm90W4TilesShape& shape, int num_splits, int64_t n,
                                                   int64_t num_sms) {
  const int64_t num_blocks = ceil_div(n, 16 * shape.row_tiles);
  const int64_t at_once = std::max<int64_t>(1, kClustersOnSms[num_splits] * num_sms / 132);
  const int64_t num_clusters =
      std::max(std::min(num_blocks, at_once), ceil_div(num_blocks, gemm_sm90_w4_tiles_max_blocks(shape.row_tiles)));
  return {shape, num_splits, num_clusters * num_splits};
}

// The smallest shape for so many rows and the split at which the SM with most of the weight has least of it. 0 CTAs if
// there are more rows than any shape has.
inline GemmSm90W4TilesConfig gemm_sm90_w4_tiles_config(int64_t m, int64_t n, int64_t k, int64_t num_sms) {
  GemmSm90W4TilesConfig best = {};
  for (const GemmSm90W4TilesShape& shape : kGemmSm90W4TilesShapes) {
    if (shape.block_m < m) continue;
    int64_t least = 0;
    for (int splits = 1; splits <= std::min<int64_t>(k / 64, 8); ++splits) {
      const GemmSm90W4TilesConfig config = gemm_sm90_w4_tiles_of(shape, splits, n, num_sms);
      const int64_t at_once = std::max<int64_t>(1, kClustersOnSms[splits] * num_sms / 132);
      const int64_t waves = ceil_div(config.num_ctas / splits, at_once);
      // A cluster's barrier and sums from other SMs are worth some 16 tiles.
      const int64_t most =
          waves * config.num_blocks(n) * shape.row_tiles * config.num_columns(k) + (splits > 1 ? 16 : 0);
      if (least != 0 && most >= least) continue;
      least = most;
      best = config;
    }
    break;
  }
  return best;
}

}  // namespace fastattn
