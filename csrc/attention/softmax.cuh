// Scaling, softcap and the online softmax on accumulator fragments (layout: arch/mma_sm80.cuh).
//
// Scores are kept in base 2: scaled by softmax_scale * log2(e), so that exp is one ex2 instruction.
#pragma once

#include <cstdint>

namespace fastattn {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// 2^x in one instruction (2 ulp); 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// tanh with an absolute error near 1e-7 from one ex2 and one division. Not tanh.approx: its 2^-11
// would be an error of 0.02 in a logit that is capped at 50.
__device__ __forceinline__ float tanh_exp2(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(2.0f * kLog2E * x));
}

// How a raw product q . k becomes a base-2 score; made once on the host side of the launch.
struct ScoreScale {
  float pre;      // softmax_scale * log2(e), or softmax_scale / softcap
  float softcap;  // softcap * log2(e), or 0 for none

  __host__ static ScoreScale make(float softmax_scale, float softcap) {
    return softcap > 0.0f ? ScoreScale{softmax_scale / softcap, softcap * kLog2E}
                          : ScoreScale{softmax_scale * kLog2E, 0.0f};
  }
};

template <int NUM_TILES>
__device__ __forceinline__ void scale_scores(float (&scores)[NUM_TILES][4], ScoreScale scale) {
#pragma unroll
  for (int tile = 0; tile < NUM_TILES; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[tile][i] *= scale.pre;
  }
  if (scale.softcap > 0.0f) {
#pragma unroll
    for (int tile = 0; tile < NUM_TILES; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][i] = scale.softcap * tanh_exp2(scores[tile][i]);
    }
  }
}

// The reference point of a row's exponentials. A row that has seen nothing has maximum -inf;
// subtracting that would give NaN, subtracting 0 gives exp2(-inf) = 0.
__device__ __forceinline__ float finite_max(float row_max) { return row_max == -INFINITY ? 0.0f : row_max; }

// Natural-log LSE from a base-2 maximum and the sum relative to it; -inf for an empty row.
__device__ __forceinline__ float log_sum_exp(float row_max, float row_sum) {
  return row_sum == 0.0f ? -INFINITY : (row_max + log2f(row_sum)) * kLn2;
}

// Running maximum and sum of the two rows (g and g + 8) a lane takes part in. The maximum is the
// same in the four lanes of a row; the sum is each lane's own share until `finish`.
struct OnlineSoftmax {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.0f, 0.0f};

  // Turns scores into probabilities relative to the new maximum and rescales `out` to it.
  template <int NUM_TILES, int NUM_OUT_TILES>
  __device__ __forceinline__ void update(float (&scores)[NUM_TILES][4], float (&out)[NUM_OUT_TILES][4]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float new_max = row_max[row];
#pragma unroll
      for (int tile = 0; tile < NUM_TILES; ++tile) {
        new_max = fmaxf(new_max, fmaxf(scores[tile][2 * row], scores[tile][2 * row + 1]));
      }
      new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 1));
      new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, 2));

      const float origin = finite_max(new_max);
      const float correction = exp2_approx(row_max[row] - origin);
      row_max[row] = new_max;
      row_sum[row] *= correction;
#pragma unroll
      for (int tile = 0; tile < NUM_OUT_TILES; ++tile) {
        out[tile][2 * row] *= correction;
        out[tile][2 * row + 1] *= correction;
      }
#pragma unroll
      for (int tile = 0; tile < NUM_TILES; ++tile) {
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          scores[tile][i] = exp2_approx(scores[tile][i] - origin);
          row_sum[row] += scores[tile][i];
        }
      }
    }
  }

  // Completes the sums over the four lanes of each row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      row_sum[row] += __shfl_xor_sync(0xffffffffu, row_sum[row], 1);
      row_sum[row] += __shfl_xor_sync(0xffffffffu, row_sum[row], 2);
    }
  }
};

}  // namespace fastattn
