// Codes of 8 bits: a row's scale, and its elements divided by it.
//
// Magnitudes are compared as their bits: as integers NaN is above infinity, and both above every number, so either
// reaches the scale, where the product finds it. Division, not multiplication by a reciprocal: the same bits as on the
// CPU. A scale below the normal numbers is coarse: only then can a quotient round beyond LARGEST, and is cut. A row
// with a NaN or an infinity, in whose scale it is, has codes that are all its zero point: times such a scale that is
// NaN.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "arch/vec.cuh"

namespace fastattn {

template <typename Q>
struct Code;

template <>
struct Code<int8_t> {
  static constexpr float kLargest = 127.0f;
  // Of a NaN 0.
  __device__ static __forceinline__ int8_t of(float x) {
    return static_cast<int8_t>(max(-127, min(127, __float2int_rn(x))));
  }
};

template <>
struct Code<__nv_fp8_e4m3> {
  static constexpr float kLargest = 448.0f;
  // Of a NaN NaN.
  __device__ static __forceinline__ __nv_fp8_e4m3 of(float x) { return __nv_fp8_e4m3(x); }
};

// The bits of the largest magnitude, of `largest` and these.
template <typename T, int VEC>
__device__ __forceinline__ uint32_t largest_magnitude(uint32_t largest, const Pack<T, VEC>& elements) {
  float values[VEC];
  unpack(elements, values);
#pragma unroll
  for (float value : values) largest = max(largest, __float_as_uint(fabsf(value)));
  return largest;
}

// What elements of that largest magnitude are divided by; of zeros 1.
template <typename Q>
__device__ __forceinline__ float scale_of(uint32_t largest) {
  const float scale = __uint_as_float(largest) / Code<Q>::kLargest;
  return scale == 0.0f ? 1.0f : scale;
}

template <typename Q, typename T, int VEC>
__device__ __forceinline__ Pack<Q, VEC> codes_of(const Pack<T, VEC>& elements, float scale) {
  float values[VEC];
  unpack(elements, values);
  Pack<Q, VEC> codes;
#pragma unroll
  for (int i = 0; i < VEC; ++i) codes.words[i] = Code<Q>::of(values[i] / scale);
  return codes;
}

}  // namespace fastattn
