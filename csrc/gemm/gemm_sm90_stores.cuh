// Epilogues of the Hopper GEMM for a few rows that write themselves what a lane has, four columns of a row:
//
//   GemmSm90Sampled   a language model's head: of the rounded logits, the best of a tile's columns
//                     (sampling/gumbel_max.cuh)
//   GemmSm90Added     sum + residual, rounded once, and sums of squares; for many rows too: gemm_sm90_added_rows.cuh
//
// An object is what a lane needs of a row besides; `load` asks for it, of the first row before the products.
#pragma once

#include "arch/global_memory.cuh"
#include "arch/vec.cuh"
#include "gemm/gemm_sm90_operands.cuh"
#include "sampling/gumbel_max.cuh"

namespace fastattn {

struct GemmSm90Stores {
  static constexpr int kRows = 1;
  static constexpr bool kStores = true, kAdds = false;
  template <typename Params>
  __device__ static __forceinline__ float apply(const Params&, const float (&sums)[1]) {
    return sums[0];
  }
};

struct GemmSm90Sampled : GemmSm90Stores {
  using Params = GemmSm90SampledParams;
  GumbelRow of_row = {};

  __device__ __forceinline__ void load(const Params& p, int32_t row, int32_t) {
    of_row = GumbelRow::of(p.temperature, p.seed, p.position, row);
  }

  // By whole warps, LANES with neighbouring columns a row.
  template <typename T, int LANES>
  __device__ __forceinline__ void store(const Params& p, const float (&logits)[4], int32_t row, int32_t column,
                                        int32_t tile_n, bool is_there) const {
    uint64_t best = kNoChoice;
    if (is_there) {  // rounded as `linear` does
      const float2 low = unpack_pair<T>(pack_pair<T>(logits[0], logits[1]));
      const float2 high = unpack_pair<T>(pack_pair<T>(logits[2], logits[3]));
      best = best_of_four(of_row, {low.x, low.y, high.x, high.y}, p.first_id + column);
    }
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
      best = better_choice(best, __shfl_xor_sync(0xffffffffu, best, distance));
    }
    if (is_there && threadIdx.x % LANES == 0) p.choices[row * p.config.n_tiles + tile_n] = best;
  }
};

struct GemmSm90Added : GemmSm90Stores {
  using Params = GemmSm90AddedParams;
  static constexpr bool kAdds = true;
  uint2 residual = {};

  __device__ __forceinline__ static const uint2* address(const Params& p, int32_t row, int32_t column) {
    return reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.residual) + row * p.residual_stride + column);
  }
  __device__ __forceinline__ static void prefetch(const Params& p, int32_t row, int32_t column) {
    prefetch_l2(address(p, row, column));
  }
  __device__ __forceinline__ void load(const Params& p, int32_t row, int32_t column) {
    residual = *address(p, row, column);
  }

  template <typename T, int>
  __device__ __forceinline__ void store(const Params& p, const float (&sums)[4], int32_t row, int32_t column, int32_t,
                                        bool is_there) const {
    uint2 words = {};
    if (is_there) {
      const float2 low = unpack_pair<T>(residual.x), high = unpack_pair<T>(residual.y);
      words =
          make_uint2(pack_pair<T>(sums[0] + low.x, sums[1] + low.y), pack_pair<T>(sums[2] + high.x, sums[3] + high.y));
      *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + row * p.n + column) = words;
    }
    if (p.squares == nullptr) return;
    constexpr int kLanes = kGemmSm90SquaresPart / 4;  // with the columns of a sum
    const float2 low = unpack_pair<T>(words.x), high = unpack_pair<T>(words.y);
    float squares = low.x * low.x + low.y * low.y + high.x * high.x + high.y * high.y;
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      squares += __shfl_xor_sync(0xffffffffu, squares, distance);
    }
    if (is_there && threadIdx.x % kLanes == 0) {
      p.squares[row * num_squares_parts(p.n) + column / kGemmSm90SquaresPart] = squares;
    }
  }
};

}  // namespace fastattn
