// Tiles of the sm_80 GEMM and the heuristic that picks one. Plain C++: no CUDA call.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastattn {

// How one CTA is cut up; the template argument of the kernel, by its place in kGemmSm80Tiles.
struct GemmSm80Tile {
  int block_m;
  int block_n;
  int block_k;
  int warps_m;
  int warps_n;
  int num_stages;

  constexpr int num_threads() const { return 32 * warps_m * warps_n; }
};

// All of them stay within the 99 KiB of shared memory of sm_86.
constexpr GemmSm80Tile kGemmSm80Tiles[] = {
    {16, 64, 128, 1, 4, 4},   // up to 16 rows: streams the weight
    {64, 64, 64, 2, 2, 4},    // few rows, or too few large tiles to fill the device
    {128, 128, 32, 2, 4, 4},  // large
};
constexpr int kNumGemmSm80Tiles = sizeof(kGemmSm80Tiles) / sizeof(kGemmSm80Tiles[0]);

struct GemmProblem {
  int64_t m;
  int64_t n;
  int64_t k;
  bool rows_aligned;  // 16-byte aligned rows of x and weight, K a multiple of 8
  int64_t num_sms;
  bool batch_invariant = false;  // K is not split: all tiles add up a sum in the same order
};

struct GemmConfig {
  bool fallback;   // the plain kernel: rows that cp.async cannot load
  int tile_idx;    // into kGemmSm80Tiles
  int num_splits;  // CTAs that share the K of one tile; > 1 needs a workspace (splits, M, N) fp32
  int64_t m_tiles;
  int64_t n_tiles;
};

// How K is split depends on M, so that a row is not bitwise independent of its batch unless it is to be.
inline GemmConfig gemm_sm80_config(const GemmProblem& problem) {
  constexpr int64_t kMaxSplits = 16;
  constexpr int64_t kMinStepsPerSplit = 4;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto num_tiles = [&](int tile_idx) {
    return ceil_div(problem.m, kGemmSm80Tiles[tile_idx].block_m) *
           ceil_div(problem.n, kGemmSm80Tiles[tile_idx].block_n);
  };

  GemmConfig config = {};
  config.fallback = !problem.rows_aligned;
  config.num_splits = 1;
  if (problem.m <= 16) {
    config.tile_idx = 0;
  } else if (problem.m <= 64 || num_tiles(2) < problem.num_sms) {
    config.tile_idx = 1;
  } else {
    config.tile_idx = 2;
  }
  const GemmSm80Tile& tile = kGemmSm80Tiles[config.tile_idx];
  config.m_tiles = ceil_div(problem.m, tile.block_m);
  config.n_tiles = ceil_div(problem.n, tile.block_n);

  // Split K when there is less than one CTA per SM, up to about two; a split costs a round trip of
  // its fp32 tile, so it must have some steps of its own, and none may be empty.
  const int64_t tiles = config.m_tiles * config.n_tiles;
  const int64_t num_steps = ceil_div(problem.k, tile.block_k);
  if (!config.fallback && !problem.batch_invariant && tiles > 0 && tiles < problem.num_sms) {
    const int64_t wanted = std::min({2 * problem.num_sms / tiles, kMaxSplits, num_steps / kMinStepsPerSplit});
    if (wanted > 1) {
      config.num_splits = static_cast<int>(ceil_div(num_steps, ceil_div(num_steps, wanted)));
    }
  }
  return config;
}

}  // namespace fastattn
