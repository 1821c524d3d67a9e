// What the Hopper GEMMs multiply, and what a sum is multiplied by: a type for each kind, the template argument of both
// kernels.
//
//   kind           x, weight    sum                                  out
//   GemmSm90Dense  T            fp32                                 sum + bias
//   GemmSm90Int8   int8         int32, exact                         sum * (x_scale * weight_scale) + bias, the sum
//                                                                    less x_zero_point * weight_code_sum if they are
//                                                                    there
//   GemmSm90Fp8    e4m3         fp32, see multiply_stages            the same
//   GemmSm90Fp8Blocks  e4m3     fp32, of panels times scales         sum + bias: gemm_sm90_block_scales.cuh
//   GemmSm90Normed T            fp32                                 of a norm of x: gemm_sm90_norm.cuh
//
// Each type has
//   Element, Out   the elements of x and weight, of out and bias
//   kDType         the former's
//   Sum            what sums are kept in
//   kScaled        whether there are scales, then also
//   row_scale      what a row's sums are multiplied by
//   column_factors, column_stride   where memory has the columns', or nullptr
//   column_factor  what a column's sums are multiplied by, given what memory has; with LayerNorm what a row's mean is
//   kTwoLevels     whether sums of the tensor cores go into sums in fp32 registers, a panel of K at a time
//   kNorm          what is done to x's rows before
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <type_traits>

#include "gemm/gemm_sm90.h"

namespace fastattn {

template <typename T>
struct GemmSm90Dense {
  using Element = T;
  using Out = T;
  using Sum = float;
  static constexpr DType kDType = std::is_same_v<T, __half> ? DType::kFloat16 : DType::kBFloat16;
  static constexpr bool kScaled = false, kTwoLevels = false;
  static constexpr GemmSm90Norm kNorm = GemmSm90Norm::kNone;
};

template <typename Operands>
constexpr bool kGemmSm90HasNorm = Operands::kNorm != GemmSm90Norm::kNone;

// Sums of squares of a row of so many columns, on the device.
__device__ __forceinline__ int32_t num_squares_parts(int64_t columns) {
  return (static_cast<int32_t>(columns) + kGemmSm90SquaresPart - 1) / kGemmSm90SquaresPart;
}

template <typename T, GemmSm90Norm NORM>
struct GemmSm90Normed : GemmSm90Dense<T> {
  static constexpr GemmSm90Norm kNorm = NORM;
  __device__ static __forceinline__ const float* column_factors(const GemmSm90Params& p) { return p.weight_sum; }
  __device__ static __forceinline__ int64_t column_stride(const GemmSm90Params&) { return 1; }
  __device__ static __forceinline__ float column_factor(const GemmSm90Params&, float stored) { return stored; }
};

struct GemmSm90EightBit {
  static constexpr bool kScaled = true;
  static constexpr GemmSm90Norm kNorm = GemmSm90Norm::kNone;
  __device__ static __forceinline__ float row_scale(const GemmSm90Params& p, int64_t row) {
    return p.x_scale[row * p.x_scale_stride];
  }
  __device__ static __forceinline__ const float* column_factors(const GemmSm90Params& p) { return p.weight_scale; }
  __device__ static __forceinline__ int64_t column_stride(const GemmSm90Params& p) { return p.weight_scale_stride; }
  __device__ static __forceinline__ float column_factor(const GemmSm90Params&, float stored) { return stored; }
};

template <typename T>
struct GemmSm90Int8 : GemmSm90EightBit {
  using Element = int8_t;
  using Out = T;
  using Sum = int32_t;
  static constexpr DType kDType = DType::kInt8;
  static constexpr bool kTwoLevels = false;
};
// Whether a call may have zero points. Not a kind of its own: that would be all instances again.
template <typename Operands>
constexpr bool kGemmSm90HasZeroPoints = std::is_same_v<typename Operands::Sum, int32_t>;

__device__ __forceinline__ int32_t zero_point_of(const GemmSm90Params& p, int64_t row) {
  return p.x_zero_point != nullptr ? p.x_zero_point[row * p.x_scale_stride] : 0;
}

// FAST_ACCUM: the tensor cores add up all of K.
template <typename T, bool FAST_ACCUM>
struct GemmSm90Fp8 : GemmSm90EightBit {
  using Element = __nv_fp8_e4m3;
  using Out = T;
  using Sum = float;
  static constexpr DType kDType = DType::kFloat8E4M3;
  static constexpr bool kTwoLevels = !FAST_ACCUM;
};

// The scales are those of blocks, and are in the sums.
template <typename T>
struct GemmSm90Fp8Blocks {
  using Element = __nv_fp8_e4m3;
  using Out = T;
  using Sum = float;
  static constexpr DType kDType = DType::kFloat8E4M3;
  static constexpr bool kScaled = false, kTwoLevels = true;
  static constexpr GemmSm90Norm kNorm = GemmSm90Norm::kNone;
};
template <typename Operands>
constexpr bool kGemmSm90HasBlockScales = false;
template <typename T>
constexpr bool kGemmSm90HasBlockScales<GemmSm90Fp8Blocks<T>> = true;

// Four tiles of sums as floats, in their own registers: a copy costs some that large tiles do not have.
template <int NUM_TILES>
__device__ __forceinline__ auto floats_of(float (&sums)[NUM_TILES][4], int tile) -> float (&)[4][4] {
  return reinterpret_cast<float (&)[4][4]>(sums[tile]);
}
template <int NUM_TILES>
__device__ __forceinline__ auto floats_of(int32_t (&sums)[NUM_TILES][4], int tile) -> float (&)[4][4] {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    int32_t& sum = sums[tile + i / 4][i % 4];
    sum = __float_as_int(static_cast<float>(sum));
  }
  return reinterpret_cast<float (&)[4][4]>(sums[tile]);
}

__device__ __forceinline__ float4& floats_of(float4& sums) { return sums; }
__device__ __forceinline__ float4& floats_of(int4& sums) {
  const float4 floats = make_float4(sums.x, sums.y, sums.z, sums.w);
  return reinterpret_cast<float4&>(sums) = floats;
}

// Of two columns of out, the first one even.
__device__ __forceinline__ float2 weight_scales_of(const GemmSm90Params& p, int64_t column) {
  if (p.weight_scale_stride == 0) {
    const float scale = __ldg(p.weight_scale);
    return make_float2(scale, scale);
  }
  return __ldg(reinterpret_cast<const float2*>(p.weight_scale + column));
}

}  // namespace fastattn
