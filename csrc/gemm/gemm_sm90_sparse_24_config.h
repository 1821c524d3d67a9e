// Tiles of the Hopper GEMM for 2:4 sparse weights and the heuristic that picks one. Plain C++: no CUDA call.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm/gemm_sm90_config.h"

namespace fastattn {

constexpr int kGemmSm90SparseN = 128;        // rows of weight of a CTA
constexpr int kGemmSm90SparseUnitK = 64;     // columns that have a word of metadata for each of 256 threads
constexpr int kGemmSm90SparsePaddedK = 512;  // which those of metadata are a multiple of: whole stages of any tile

constexpr GemmSm90Tile kGemmSm90SparseTiles[] = {{16, 128}, {64, 128}, {128, 128}, {256, 128}};

// Sums in two levels (fp8) take registers.
constexpr bool gemm_sm90_sparse_has_tile(const GemmSm90Tile& tile, bool two_levels) {
  return !two_levels || tile.block_m < 256;
}

// CTAs of a cluster, which share x.
constexpr int gemm_sm90_sparse_sharing(int block_m) { return block_m < 128 ? 1 : 2; }

// Bytes of a stored row of weight that a stage has: memory reads long runs better, and four stages have to be there.
constexpr int gemm_sm90_sparse_row_bytes(int block_m) { return block_m < 128 ? 256 : block_m == 128 ? 128 : 64; }

// Columns of K.
constexpr int64_t gemm_sm90_sparse_stage_k(int block_m, int64_t element_bytes) {
  return 2 * gemm_sm90_sparse_row_bytes(block_m) / element_bytes;
}

// All that follows from the tile and whether CTAs share the stages of all tiles (stream-K).
inline void set_gemm_sm90_sparse_grid(GemmSm90Config& config, const GemmSm90Problem& problem) {
  const int block_m = config.tile.block_m, sharing = gemm_sm90_sparse_sharing(block_m);
  config.m_tiles = ceil_div(problem.m, block_m);
  // A CTA loads a share of a tile's rows of x, by eights, as swizzles have them.
  const int64_t unit = 8 * sharing;
  config.rows = static_cast<int>(ceil_div(ceil_div(problem.m, config.m_tiles), unit) * unit);
  config.n_tiles = ceil_div(problem.n, sharing * config.tile.block_n);
  config.group_rows = 4;
  const int64_t num_tiles = config.m_tiles * config.n_tiles;
  const int64_t num_stages = ceil_div(problem.k, gemm_sm90_sparse_stage_k(block_m, problem.element_bytes));
  const int64_t shares = config.stream_k ? num_tiles * num_stages : num_tiles;
  config.num_ctas = sharing * std::min(shares, std::max<int64_t>(1, problem.num_sms / sharing));
}

// Microseconds, about, by arithmetic. For 64 problems measured on an H200 what it chooses takes 0.3 % more than the
// fastest in the mean, 6 % at most (docs/design/gemm_sm90.md).
inline double gemm_sm90_sparse_time(const GemmSm90Config& config, const GemmSm90Problem& problem) {
  const int block_m = config.tile.block_m, sharing = gemm_sm90_sparse_sharing(block_m);
  const double element_bytes = static_cast<double>(problem.element_bytes);
  const double weight_bytes =
      static_cast<double>(problem.n) * static_cast<double>(problem.k) * (element_bytes / 2 + 0.125);
  const int64_t num_tiles = config.m_tiles * config.n_tiles, num_clusters = config.num_ctas / sharing;
  const int64_t num_stages = ceil_div(problem.k, gemm_sm90_sparse_stage_k(block_m, problem.element_bytes));
  // 32 bytes of a stored row: products of two groups, bound by what shared memory gives, and what comes out of L2.
  const double m = static_cast<double>(block_m);
  const double products_us = 2.0 * std::max(m / 2.0, (64.0 * 32.0 + 64.0 * m) / 128.0) / 1755.0;
  const double loaded = 128.0 * 32.0 + 1024.0 / element_bytes + 64.0 * m / static_cast<double>(sharing);
  const double step_us = std::max(products_us, loaded / 32.0 / 1755.0) + 0.01;
  const double steps = static_cast<double>(gemm_sm90_sparse_row_bytes(block_m) / 32);
  const double waves = static_cast<double>(ceil_div(num_tiles, num_clusters));
  const double stages = config.stream_k ? static_cast<double>(ceil_div(num_tiles * num_stages, num_clusters))
                                        : waves * static_cast<double>(num_stages);
  const double num_others = static_cast<double>(ceil_div(num_clusters, num_tiles));
  const double sums = 128.0 * m;
  const double handed_us = config.stream_k ? 1.5 + sums * (7.0e-5 + 1.0e-4 * num_others) : 0.0;
  const double epilogues_us = waves * (0.5 + sums * 6.7e-5);
  return 6.0 + std::max(weight_bytes / 2.75e6, stages * steps * step_us) + epilogues_us + handed_us;
}

// The best by that measure. A row's result depends on M, so that it is not bitwise independent of its batch.
inline GemmSm90Config gemm_sm90_sparse_config(const GemmSm90Problem& problem) {
  GemmSm90Config best = {};
  double best_us = 0.0;
  for (const GemmSm90Tile& tile : kGemmSm90SparseTiles) {
    if (!gemm_sm90_sparse_has_tile(tile, problem.two_levels)) continue;
    for (const bool stream_k : {false, true}) {
      GemmSm90Config config = {};
      config.tile = tile;
      config.stream_k = stream_k;
      config.num_splits = 1;
      set_gemm_sm90_sparse_grid(config, problem);
      // CTAs that are at different places of K share less in the L2 cache: with more tiles than a wave has that costs
      // more than an even share gains.
      const int sharing = gemm_sm90_sparse_sharing(tile.block_m);
      if (stream_k && config.m_tiles * config.n_tiles >= problem.num_sms / sharing) continue;
      const double us = gemm_sm90_sparse_time(config, problem);
      if (best.num_ctas == 0 || us < best_us) {
        best = config;
        best_us = us;
      }
    }
  }
  return best;
}

}  // namespace fastattn
