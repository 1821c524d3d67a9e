// Shapes of the Hopper GEMM for few rows of x and weights of 4 bits in tiles, and the heuristic that picks one. Plain
// C++: no CUDA call.
#pragma once

#include "gemm/gemm_sm90_w4_config.h"

namespace fastattn {

constexpr int kGemmSm90W4TilesWarps = 8;  // of a CTA, of which an SM works on one at a time

// Up to block_m rows of x. Of the weight row_tiles tiles, one above the other, are a block, of which a warp multiplies
// stage_tiles tiles of columns at a time, and has `stages` of those. A CTA may have max_blocks.
struct GemmSm90W4TilesShape {
  int block_m;
  int row_tiles;
  int stage_tiles;
  int stages;
  int max_blocks;
};
constexpr GemmSm90W4TilesShape kGemmSm90W4TilesShapes[] = {{8, 1, 8, 2, 16}, {16, 2, 3, 2, 8}};

struct GemmSm90W4TilesConfig {
  GemmSm90W4TilesShape shape;
  int num_splits;  // CTAs of a cluster, which share K
  int pass_tiles;  // of so many tiles of columns x is in shared memory at a time
  int num_shares;  // of blocks, that the warps of a CTA have, at most
  int smem_bytes;  // for all of it
  int64_t num_ctas;
};

// Of all rows of x and so many tiles of columns; 16 more a row, so that eight of them lie in different banks.
constexpr int64_t gemm_sm90_w4_tiles_x_bytes(int64_t m, int64_t tiles) { return m * (tiles * 128 + 16); }

inline GemmSm90W4TilesConfig gemm_sm90_w4_tiles_of(const GemmSm90W4TilesShape& shape, int num_splits, int64_t m,
                                                   int64_t n, int64_t k, int64_t num_sms) {
  GemmSm90W4TilesConfig config = {};
  config.shape = shape;
  config.num_splits = num_splits;
  const int64_t num_blocks = ceil_div(n, 16 * shape.row_tiles);
  const int64_t at_once = std::max<int64_t>(1, kClustersOnSms[num_splits] * num_sms / 132);
  const int64_t num_clusters = std::max(std::min(num_blocks, at_once), ceil_div(num_blocks, shape.max_blocks));
  config.num_ctas = num_clusters * num_splits;
  config.num_shares = static_cast<int>(kGemmSm90W4TilesWarps + ceil_div(num_blocks, num_clusters) - 1);
  const int64_t stages_bytes =
      int64_t{kGemmSm90W4TilesWarps} * shape.stages * shape.row_tiles * shape.stage_tiles * 576;
  const int64_t sums_bytes = int64_t{config.num_shares} * shape.block_m * (16 * shape.row_tiles + 4) * 4;
  const int64_t fixed_bytes = stages_bytes + sums_bytes + 1024, columns = ceil_div(k / 64, num_splits);
  const int64_t most = ((227 * 1024 - fixed_bytes) / m - 16) / 128;
  config.pass_tiles = static_cast<int>(ceil_div(columns, ceil_div(columns, most)));
  config.smem_bytes = static_cast<int>(fixed_bytes + gemm_sm90_w4_tiles_x_bytes(m, config.pass_tiles));
  return config;
}

// Nanoseconds, about, on an H100: of what the SM with most of the work reads, and what there is beside that.
inline double gemm_sm90_w4_tiles_time(const GemmSm90W4TilesConfig& config, int64_t m, int64_t n, int64_t k,
                                      int64_t num_sms) {
  const GemmSm90W4TilesShape& shape = config.shape;
  const int64_t num_clusters = config.num_ctas / config.num_splits;
  const int64_t at_once = std::max<int64_t>(1, kClustersOnSms[config.num_splits] * num_sms / 132);
  const int64_t waves = ceil_div(num_clusters, at_once), columns = ceil_div(k / 64, config.num_splits);
  const int64_t tiles = ceil_div(ceil_div(n, 16 * shape.row_tiles), num_clusters) * shape.row_tiles * columns;
  const double weight_ns = 25.0 * static_cast<double>(tiles), x_ns = 2.5 * static_cast<double>(m * columns);
  const double passes_ns = 1500.0 * static_cast<double>(ceil_div(columns, config.pass_tiles) - 1);
  const double splits_ns = config.num_splits > 1 ? 300.0 + 100.0 * config.num_splits : 0.0;
  return static_cast<double>(waves) * (weight_ns + x_ns + passes_ns + splits_ns + 1000.0);
}

// The smallest shape for so many rows, and the best split by that measure. 0 CTAs if no shape has so many.
inline GemmSm90W4TilesConfig gemm_sm90_w4_tiles_config(int64_t m, int64_t n, int64_t k, int64_t num_sms) {
  GemmSm90W4TilesConfig best = {};
  for (const GemmSm90W4TilesShape& shape : kGemmSm90W4TilesShapes) {
    if (shape.block_m < m) continue;
    double best_ns = 0.0;
    for (int splits = 1; splits <= std::min<int64_t>(k / 64, 8); ++splits) {
      const GemmSm90W4TilesConfig config = gemm_sm90_w4_tiles_of(shape, splits, m, n, k, num_sms);
      const double ns = gemm_sm90_w4_tiles_time(config, m, n, k, num_sms);
      if (best.num_ctas != 0 && ns >= best_ns) continue;
      best = config;
      best_ns = ns;
    }
    break;
  }
  return best;
}

}  // namespace fastattn
