// What becomes of sums, scaled and with the bias added, before they are rounded: a type for each kind, the template
// argument of both Hopper kernels beside their operands.
//
//   kind            rows of weight for a column of out               out
//   GemmSm90Plain   1                                                sum
//   GemmSm90Gated   2: of a gate, and of what it lets through (up)   act(sum of gate) * sum of up
//
// Gates and ups take turns in the weight, eight rows each. So they are two neighbouring tiles of eight of an
// accumulator, or, where rows of weight are wgmma's rows, two rows of a tile that are 8 apart: both are in the same
// thread, and its result lies where the first sum did.
//
//   weight   ┌──────────┬────────┬───────────┬─────────┬──
//   (2N, K)  │ gate 0-7 │ up 0-7 │ gate 8-15 │ up 8-15 │ …
//            └──────────┴────────┴───────────┴─────────┴──
//
// Each type has
//   Params  what a call gives
//   kRows   rows of weight for a column of out
//   apply   what is made of their sums
//   kStores few rows: whether it writes itself what a lane has, four columns of a row (gemm_sm90_stores.cuh)
//   kAdds   many rows: whether it adds others' rows (gemm_sm90_added_rows.cuh)
#pragma once

#include <cstdint>

#include "arch/exp2.cuh"
#include "gemm/gemm_sm90.h"

namespace fastattn {

struct GemmSm90Plain {
  using Params = GemmSm90Params;
  static constexpr int kRows = 1;
  static constexpr bool kStores = false, kAdds = false;
  template <typename Params>
  __device__ static __forceinline__ float apply(const Params&, const float (&sums)[1]) {
    return sums[0];
  }
};

// SiLU is g * sigmoid(g), and GeLU in its tanh form g * sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3)): the same but for two
// numbers, which the call brings, so that both are one instance.
struct GemmSm90Gated {
  using Params = GemmSm90Params;
  static constexpr int kRows = 2;
  static constexpr bool kStores = false, kAdds = false;
  __device__ static __forceinline__ float apply(const GemmSm90Params& p, const float (&sums)[2]) {
    const float gate = sums[0];
    const float square = fminf(gate * gate, 0x1p60f);  // infinity times a factor of 0 would be NaN
    const float exponent = gate * fmaf(p.gate_cubic, square, p.gate_linear);
    return __fdividef(gate, 1.0f + exp2_approx(-exponent)) * sums[1];
  }
};

// The row of weight of the i-th sum of a column of out.
template <typename Epilogue>
__device__ __forceinline__ int32_t weight_row_of(int32_t column, int i) {
  if constexpr (Epilogue::kRows == 1) return column;
  return column / 8 * 16 + column % 8 + 8 * i;
}

}  // namespace fastattn
