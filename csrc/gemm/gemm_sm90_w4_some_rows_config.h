// Tiles of the Hopper GEMM for 17 to 64 rows of x and weights of 4 bits in tiles, and the heuristic that picks one.
// Plain C++: no CUDA call.
#pragma once

#include "gemm/gemm_sm90_w4_config.h"

namespace fastattn {

constexpr int kGemmSm90W4SomeRowsTiles = 16;  // of a CTA, one above the other: a warp each
constexpr int kGemmSm90W4SomeRowsThreads = 32 * (kGemmSm90W4SomeRowsTiles + 1);
constexpr int kGemmSm90W4SomeRowsBlocks[] = {32, 48, 64};  // rows of x

struct GemmSm90W4SomeRowsConfig {
  int block_m;
  int num_sharers;  // CTAs of a cluster that have the same columns, and bring x for each other
  int num_splits;   // which share K
  int64_t num_ctas;
};

inline GemmSm90W4SomeRowsConfig gemm_sm90_w4_some_rows_of(int block_m, int num_sharers, int num_splits, int64_t n,
                                                          int64_t num_sms) {
  const int64_t row_tiles = n / 16;
  const int64_t at_once = std::max<int64_t>(1, kClustersOnSms[num_splits * num_sharers] * num_sms / 132);
  const int64_t most = kGemmSm90W4SomeRowsTiles * num_sharers;
  const int64_t num_clusters = std::max(std::min(row_tiles, at_once), ceil_div(row_tiles, most));
  return {block_m, num_sharers, num_splits, num_clusters * num_splits * num_sharers};
}

}  // namespace fastattn
