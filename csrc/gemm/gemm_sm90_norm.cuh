// RMSNorm and LayerNorm of x's rows inside the Hopper GEMMs, without a normalized x: with the norm's weight in
// `weight`,
//
//   RMSNorm     out[m, n] = sum / rms(x[m])                                 + bias[n]     sum = x[m] . weight[n]
//   LayerNorm   out[m, n] = (sum - mean(x[m]) * weight_sum[n]) / std(x[m])  + bias[n]     weight_sum[n] = weight[n] . 1
//
// so that all a row needs are two numbers at the end. For many rows a kernel in front gives them
// (gemm_row_norms_sm90.cu). For few, consumers add up what these are made of from the stages of x as they pass by,
// while their products run:
//
//               64 columns of a stage = 8 chunks of 16 bytes
//              ┌────┬────┬────┬────┬────┬────┬────┬────┐
//   8 rows     │ lane 0  │ lane 1  │ lane 2  │ lane 3  │     a warp reads 8 rows by two loads a lane, and all banks
//   of x       │ lane 4  │ lane 5  │ lane 6  │ lane 7  │     serve each: chunks are swizzled by their row
//              │    …    │    …    │    …    │    …    │
//              └────┴────┴────┴────┴────┴────┴────┴────┘
//
// RMSNorm's sums may be given: of parts of 32 columns, which the product that wrote x has added up.
//
// LayerNorm's sums are of x - x[m, 0]. A row's own element is at most sqrt(K) standard deviations from its mean, so
// that the variance, a difference of two sums, keeps its digits however large the mean is.
#pragma once

#include <type_traits>

#include "arch/cluster.cuh"
#include "arch/fragments.cuh"
#include "arch/panel_swizzle.cuh"
#include "arch/shared_memory.cuh"
#include "arch/vec.cuh"
#include "gemm/gemm_sm90.h"
#include "gemm/gemm_sm90_operands.cuh"

namespace fastattn {

// Sums over columns of a row: of x - x[m, 0] (LayerNorm only) and of its square; of x's square for RMSNorm.
struct GemmSm90Moments {
  float sum = 0.0f, squares = 0.0f;

  template <typename T, bool CENTRED>
  __device__ __forceinline__ void add_pair(uint32_t word, float origin) {
    float2 pair;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // two instructions, where unpack_pair takes three
      pair = make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
    } else {
      pair = unpack_pair<T>(word);
    }
    if constexpr (CENTRED) {
      pair.x -= origin;
      pair.y -= origin;
      sum += pair.x;
      sum += pair.y;
    }
    squares += pair.x * pair.x;
    squares += pair.y * pair.y;
  }
};

// What the sums of a row are to be turned into values with: (sum - mean * weight_sum) * scale.
struct GemmSm90RowNorm {
  float scale = 0.0f, mean = 0.0f;
};

template <typename T>
__device__ __forceinline__ float first_of_row(const GemmSm90Params& p, int64_t row) {
  return row < p.m ? to_float(static_cast<const T*>(p.x)[row * p.x_stride]) : 0.0f;
}

template <GemmSm90Norm NORM>
__device__ __forceinline__ GemmSm90RowNorm row_norm_of(const GemmSm90Params& p, const GemmSm90Moments& moments,
                                                       float first) {
  const float k = static_cast<float>(p.k);
  if constexpr (NORM != GemmSm90Norm::kLayer) return {rsqrtf(moments.squares / k + p.eps), 0.0f};
  const float mean = moments.sum / k, var = moments.squares / k - mean * mean;
  return {rsqrtf((var < 0.0f ? 0.0f : var) + p.eps), first + mean};  // a NaN stays one
}

// Of a warp: the moments of NUM_EIGHTS times eight rows that lie together, in a lane a quarter of the columns of row
// lane / 4 of each eight.
template <typename T, GemmSm90Norm NORM, int NUM_EIGHTS>
struct GemmSm90RowMoments {
  static constexpr bool kCentred = NORM == GemmSm90Norm::kLayer;
  GemmSm90Moments of[NUM_EIGHTS];
  float first[NUM_EIGHTS];  // x[m, 0]

  // first_row: of x, the warp's first.
  __device__ __forceinline__ void begin(const GemmSm90Params& p, int64_t first_row, int lane) {
#pragma unroll
    for (int i = 0; i < NUM_EIGHTS; ++i) {
      of[i] = {};
      first[i] = kCentred ? first_of_row<T>(p, first_row + i * 8 + lane / 4) : 0.0f;
    }
  }

  // Columns of a panel, whose rows of this warp begin at `rows`. columns_left: what x has of them and behind them; the
  // others are zeros, and stay so.
  __device__ __forceinline__ void add(const T* rows, int32_t columns_left, int lane) {
    const uint32_t address = shared_address(rows) + swizzled<128>(static_cast<uint32_t>(lane) * 32);
#pragma unroll
    for (int i = 0; i < NUM_EIGHTS; ++i) {
#pragma unroll
      for (int chunk = 0; chunk < 2; ++chunk) {
        const uint4 words = load_shared_16_bytes((address ^ chunk * 16) + i * 1024);
        const float origin = (lane % 4 * 2 + chunk) * 8 < columns_left ? first[i] : 0.0f;
        of[i].template add_pair<T, kCentred>(words.x, origin);
        of[i].template add_pair<T, kCentred>(words.y, origin);
        of[i].template add_pair<T, kCentred>(words.z, origin);
        of[i].template add_pair<T, kCentred>(words.w, origin);
      }
    }
  }

  // In place of all that, of given sums of squares a share.
  __device__ __forceinline__ void take(const GemmSm90Params& p, int32_t first_row, int lane, int32_t share,
                                       int32_t num_shares) {
    const int32_t num_parts = num_squares_parts(p.k);
    const int32_t begin = share * num_parts / num_shares, end = (share + 1) * num_parts / num_shares;
    constexpr int kAtOnce = NUM_EIGHTS < 8 ? 8 / NUM_EIGHTS : 1;  // of a row, on their way together
    const float* const of_row = p.x_squares + int64_t{first_row + lane / 4} * num_parts;
    for (int32_t first = begin + lane % 4; first < end; first += 4 * kAtOnce) {
      float asked[kAtOnce][NUM_EIGHTS] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int i = 0; i < NUM_EIGHTS; ++i) {
          const bool is_there = first + 4 * j < end && first_row + i * 8 + lane / 4 < p.m;
          if (is_there) asked[j][i] = of_row[i * 8 * num_parts + first + 4 * j];
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
        for (int i = 0; i < NUM_EIGHTS; ++i) of[i].squares += asked[j][i];
      }
    }
  }

  // Every lane gets those of its rows.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int i = 0; i < NUM_EIGHTS; ++i) {
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        of[i].squares += __shfl_xor_sync(0xffffffffu, of[i].squares, distance);
        if constexpr (kCentred) of[i].sum += __shfl_xor_sync(0xffffffffu, of[i].sum, distance);
      }
    }
  }
};

// What the CTAs of a cluster have of their runs of K, in their shared memory.
template <int PARTS, int ROWS>
struct GemmSm90SharedMoments {
  using Total = GemmSm90Moments;
  GemmSm90Moments of[PARTS][ROWS];

  template <typename T, GemmSm90Norm NORM, int NUM_EIGHTS>
  __device__ __forceinline__ void keep(const GemmSm90RowMoments<T, NORM, NUM_EIGHTS>& moments, int part, int first_row,
                                       int lane) {
    if (lane % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < NUM_EIGHTS; ++i) of[part][first_row + i * 8 + lane / 4] = moments.of[i];
  }

  // Behind the cluster's barrier.
  __device__ __forceinline__ void add_to(Total& total, int part, int32_t row, int32_t split) const {
    const float2 more = load_cluster<float2>(cluster_address(&of[part][row], split));
    total.sum += more.x;
    total.squares += more.y;
  }
};

}  // namespace fastattn
