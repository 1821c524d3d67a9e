// Scaling, softcap and the online softmax on accumulator fragments (layout: arch/mma_sm80.cuh).
//
// Exponentials are taken in base 2: a score is multiplied by softmax_scale * log2(e) in the same instruction that
// subtracts the maximum, and exp is one ex2.
#pragma once

#include <cfloat>
#include <cstdint>

#include "arch/exp2.cuh"

namespace fastattn {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// tanh with an absolute error near 1e-7 from one ex2 and one division. Not tanh.approx: its 2^-11
// would be an error of 0.02 in a logit that is capped at 50.
__device__ __forceinline__ float tanh_exp2(float x) {
  return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(2.0f * kLog2E * x));
}

// How a raw product q . k becomes a base-2 score; made once on the host side of the launch.
struct ScoreScale {
  float pre;      // softmax_scale * log2(e), or softmax_scale / softcap
  float softcap;  // softcap * log2(e), or 0 for none

  // A scale of 0 becomes one that does not differ, but for which a masked score times it is still -inf.
  __host__ static ScoreScale make(float softmax_scale, float softcap) {
    const float scale = softmax_scale > 1e-30f ? softmax_scale : 1e-30f;
    return softcap > 0.0f ? ScoreScale{scale / softcap, softcap * kLog2E} : ScoreScale{scale * kLog2E, 0.0f};
  }
};

// The reference point of a row's exponentials. A row that has seen nothing has maximum -inf;
// subtracting that would give NaN, subtracting 0 gives exp2(-inf) = 0.
__device__ __forceinline__ float finite_max(float row_max) { return row_max == -INFINITY ? 0.0f : row_max; }

// Natural-log LSE from a base-2 maximum and the sum relative to it; -inf for an empty row.
__device__ __forceinline__ float log_sum_exp(float row_max, float row_sum) {
  return row_sum == 0.0f ? -INFINITY : (row_max + log2f(row_sum)) * kLn2;
}

// What is known of a row at its end: how its O is to be multiplied, and its LSE (natural log).
struct RowResult {
  float inverse;
  float lse;
};

// From a base-2 maximum and the sum relative to it, with one more logit that has no value (base 2; -inf: none).
__device__ __forceinline__ RowResult finish_row(float row_max, float row_sum, float sink) {
  const float origin = finite_max(fmaxf(row_max, sink));
  const float weight = exp2_approx(row_max - origin);
  const float sum = __fmaf_rn(row_sum, weight, exp2_approx(sink - origin));
  return {sum == 0.0f ? 0.0f : weight / sum, log_sum_exp(origin, sum)};
}

// Running reference and sum of the rows a lane takes part in: two (g and g + 8) for each 16 of its warp. The reference
// is subtracted from a row's scores before exponentials are taken (which multiply them by `scale`); it is the maximum
// of those seen, or up to kSlack below it in base 2: then nothing is to be rescaled, and a large P is as exact as a
// small one. It is the same in the four lanes of a row; the sum is each lane's own share until `finish`.
template <int TILES_M>
struct OnlineSoftmax {
  static constexpr float kSlack = 8.0f;  // P up to 2^8 fits fp16

  float row_max[TILES_M][2];
  float row_sum[TILES_M][2];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < 2 * TILES_M; ++i) {
      row_max[i / 2][i % 2] = -INFINITY;
      row_sum[i / 2][i % 2] = 0.0f;
    }
  }

  // Turns scores into probabilities relative to the reference; if that moves, rescales `out` to the new one.
  template <int NUM_TILES, int NUM_OUT_TILES>
  __device__ __forceinline__ void update(float (&scores)[TILES_M][NUM_TILES][4],
                                         float (&out)[TILES_M][NUM_OUT_TILES][4], float scale) {
    // All rows go through each exchange between lanes together, so as to wait for it once.
    float new_max[TILES_M][2];
#pragma unroll
    for (int i = 0; i < 2 * TILES_M; ++i) {
      const auto of_tile = [&](int tile) {
        return fmaxf(scores[i / 2][tile][i % 2 * 2], scores[i / 2][tile][i % 2 * 2 + 1]);
      };
      float parts[2] = {fmaxf(row_max[i / 2][i % 2], of_tile(0)), of_tile(NUM_TILES - 1)};
#pragma unroll
      for (int tile = 1; tile < NUM_TILES - 1; ++tile) parts[tile % 2] = fmaxf(parts[tile % 2], of_tile(tile));
      new_max[i / 2][i % 2] = fmaxf(parts[0], parts[1]);
    }
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
      for (int i = 0; i < 2 * TILES_M; ++i) {
        float& row = new_max[i / 2][i % 2];
        row = fmaxf(row, __shfl_xor_sync(0xffffffffu, row, distance));
      }
    }
    // NaN if nothing was seen yet, nor is now; a maximum passes over that.
    const auto growth = [&](int i) { return new_max[i / 2][i % 2] - row_max[i / 2][i % 2]; };
    float largest = growth(0);
#pragma unroll
    for (int i = 1; i < 2 * TILES_M; ++i) largest = fmaxf(largest, growth(i));
    // Other rows are multiplied by 1, so that a row does not depend on its neighbours.
    if (__any_sync(0xffffffffu, largest * scale > kSlack)) {
#pragma unroll
      for (int i = 0; i < 2 * TILES_M; ++i) {
        const bool row_moves = growth(i) * scale > kSlack;
        const float correction = row_moves ? exp2_approx(-growth(i) * scale) : 1.0f;
        if (row_moves) row_max[i / 2][i % 2] = new_max[i / 2][i % 2];
        row_sum[i / 2][i % 2] *= correction;
#pragma unroll
        for (int tile = 0; tile < NUM_OUT_TILES; ++tile) {
          out[i / 2][tile][i % 2 * 2] *= correction;
          out[i / 2][tile][i % 2 * 2 + 1] *= correction;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float origin = fmaxf(row_max[m][half] * scale, -FLT_MAX);  // see finite_max
#pragma unroll
        for (int tile = 0; tile < NUM_TILES; ++tile) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            scores[m][tile][i] = exp2_approx(scores[m][tile][i] * scale - origin);
            row_sum[m][half] += scores[m][tile][i];
          }
        }
      }
    }
  }

  // Completes the sums over the four lanes of each row, and makes the maxima base 2.
  __device__ __forceinline__ void finish(float scale) {
#pragma unroll
    for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[m][half] *= scale;
        row_sum[m][half] += __shfl_xor_sync(0xffffffffu, row_sum[m][half], 1);
        row_sum[m][half] += __shfl_xor_sync(0xffffffffu, row_sum[m][half], 2);
      }
    }
  }
};

}  // namespace fastattn
