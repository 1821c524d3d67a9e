// The epilogue of a language model's head that draws a token and writes no logits: a lane has four of a row, rounds
// them as `linear` would, and the lanes of a row leave the best of a tile's columns (sampling/gumbel_max.cuh).
#pragma once

#include "arch/vec.cuh"
#include "gemm/gemm_sm90.h"
#include "sampling/gumbel_max.cuh"

namespace fastattn {

struct GemmSm90Sampled {
  using Params = GemmSm90SampledParams;
  static constexpr int kRows = 1;
  static constexpr bool kPicks = true;
  __device__ static __forceinline__ float apply(const Params&, const float (&sums)[1]) { return sums[0]; }

  // By whole warps, LANES with neighbouring columns a row: words are four logits from `column` on.
  template <typename T, int LANES>
  __device__ static __forceinline__ void pick(const Params& p, const uint2& words, int32_t row, int32_t column,
                                              int32_t tile_n, bool is_there) {
    uint64_t best = kNoChoice;
    if (is_there) {
      const float2 low = unpack_pair<T>(words.x), high = unpack_pair<T>(words.y);
      best = best_of_four(GumbelRow::of(p.temperature, p.seed, p.position, row), {low.x, low.y, high.x, high.y},
                          p.first_id + column);
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
      best = better_choice(best, __shfl_xor_sync(0xffffffffu, best, distance));
    }
    if (is_there && threadIdx.x % LANES == 0) p.choices[row * p.config.n_tiles + tile_n] = best;
  }
};

}  // namespace fastattn
