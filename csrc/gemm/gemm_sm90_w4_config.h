// Tiles of the Hopper GEMM for weights of 4 bits and the heuristic that picks one. Plain C++: no CUDA call.
#pragma once

#include "gemm/gemm_sm90_config.h"

namespace fastattn {

constexpr int kGemmSm90W4StageK = 256;  // columns of K: 128 bytes of a row of weight, four panels of x

// Rows of x up to which the kernel is called; above, every tile of 128 rows makes 16 bits of the weight again.
constexpr int64_t kGemmSm90W4MostRows = 256;

// A CTA's tile: so many rows of x and of weight, 64 of those to a warp group.
constexpr GemmSm90Tile kGemmSm90W4Tiles[] = {{8, 128, 2},  {16, 128, 2},  {32, 128, 2}, {64, 128, 2},
                                             {64, 256, 1}, {128, 128, 1}, {128, 192, 1}};

// In what a CTA has of 227 KiB, less 2 KiB for what is not in the ring.
constexpr int gemm_sm90_w4_stages(const GemmSm90Tile& tile) {
  return (227 * 1024 / tile.ctas_per_sm - 2048) / (2 * kGemmSm90W4StageK * tile.block_m + 128 * tile.block_n);
}

struct GemmSm90W4Problem {
  int64_t m;
  int64_t n;
  int64_t k;
  double weight_bits;  // of a weight, its share of the scales included
  int64_t num_sms;
};

struct GemmSm90W4Config {
  GemmSm90Tile tile;
  int num_splits;  // CTAs of a cluster, which share the K of a tile
  int64_t m_tiles;
  int64_t n_tiles;
  int64_t num_ctas;
};

// All that follows from the tile.
inline void set_gemm_sm90_w4_grid(GemmSm90W4Config& config, const GemmSm90W4Problem& problem, int num_splits) {
  config.num_splits = num_splits;
  config.m_tiles = ceil_div(problem.m, config.tile.block_m);
  config.n_tiles = ceil_div(problem.n, config.tile.block_n);
  config.num_ctas = config.m_tiles * config.n_tiles * num_splits;
}

// Microseconds, about. The parts are those of gemm_sm90_time, and beside them what it takes to make 16 bits of 4.
inline double gemm_sm90_w4_time(const GemmSm90W4Config& config, const GemmSm90W4Problem& problem) {
  const double block_m = config.tile.block_m, block_n = config.tile.block_n;
  const double ctas_per_sm = config.tile.ctas_per_sm;
  const double num_ctas = static_cast<double>(config.num_ctas), num_sms = static_cast<double>(problem.num_sms);
  const double weights = static_cast<double>(problem.n) * static_cast<double>(problem.k);
  const double read_us = weights * problem.weight_bits / 8.0 / 2.75e6 *
                         (1.0 + 0.1 * std::max(0.0, 1.0 - num_ctas / num_sms));  // from few SMs a little less well

  // What bounds a step of a CTA: how much the copy engine has in flight, what an SM takes in, its tensor cores, or
  // conversion at some ten cycles of a scheduler for 64 weights.
  const double step_weights = kGemmSm90W4StageK * block_n;
  const double step_bytes = 2.0 * kGemmSm90W4StageK * block_m + step_weights / 2.0;
  const double at_once = std::min(ctas_per_sm, std::max(1.0, num_ctas / num_sms));  // CTAs of an SM
  const double step_us = std::max({1.7 / (gemm_sm90_w4_stages(config.tile) - 1), at_once * step_bytes / 85e3,
                                   at_once * 2.0 * block_m * step_weights / 6.5e6, at_once * step_weights / 42e3});
  const double num_steps = static_cast<double>(ceil_div(ceil_div(problem.k, kGemmSm90W4StageK), config.num_splits));
  // Sums go to shared memory and come back from there, or from another SM's.
  const double sums_us = block_m * block_n * (config.num_splits > 1 ? 2.0e-4 : 1.0e-4) + 0.3 * (config.num_splits - 1);
  const double clusters_fit = config.num_splits <= 2 ? 1.0 : config.num_splits <= 4 ? 0.9 : 0.75;
  const double num_waves = std::ceil(num_ctas / (num_sms * clusters_fit * ctas_per_sm));
  const double l2_us = step_bytes * num_steps * num_ctas / 8.0e6;
  return 8.0 + std::max({read_us, l2_us, num_waves * num_steps * step_us}) + (num_waves - 1.0) * sums_us + sums_us;
}

// The best by that measure, over all tiles and 1 to 8 splits.
inline GemmSm90W4Config gemm_sm90_w4_config(const GemmSm90W4Problem& problem) {
  GemmSm90W4Config best = {};
  double best_us = 0.0;
  const int64_t num_steps = ceil_div(problem.k, kGemmSm90W4StageK);
  for (const GemmSm90Tile& tile : kGemmSm90W4Tiles) {
    const bool too_large = tile.block_m > 8 && tile.block_m / 2 >= problem.m;  // a smaller one does
    if (too_large || tile.block_m < std::min<int64_t>(problem.m, 64)) continue;
    for (int splits = 1; splits <= std::min<int64_t>(num_steps, 8); ++splits) {
      GemmSm90W4Config config = {};
      config.tile = tile;
      set_gemm_sm90_w4_grid(config, problem, splits);
      const double us = gemm_sm90_w4_time(config, problem);
      if (best.num_ctas == 0 || us < best_us) {
        best = config;
        best_us = us;
      }
    }
  }
  return best;
}

}  // namespace fastattn
