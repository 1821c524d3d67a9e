// Codes of 8 bits: a row's scale, and its elements divided by it.
//
// Magnitudes are compared as their bits: as integers NaN is above infinity, and both above every number, so either
// reaches the scale, where the product finds it. Quotients are those of a division, not products with a reciprocal: the
// same bits as on the CPU. A scale below the normal numbers is coarse: only then can a quotient round beyond LARGEST,
// and is cut. A row with a NaN or an infinity, in whose scale it is, has codes that are all its zero point: times such
// a scale that is NaN.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "arch/e4m3.cuh"
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

// The bits of the largest magnitude, of `largest` and these. Pairs are compared in 16 bits, which are ordered as those
// of fp32 are.
template <typename T, int VEC>
__device__ __forceinline__ uint32_t largest_magnitude(uint32_t largest, const Pack<T, VEC>& elements) {
  constexpr bool IN_PAIRS = Pack<T, VEC>::IN_PAIRS;
  float values[IN_PAIRS ? 2 : VEC];
  if constexpr (IN_PAIRS) {
    uint32_t pair = 0;
#pragma unroll
    for (uint32_t word : elements.words) pair = max_magnitudes(pair, word);
    unpack(Pack<T, 2>{pair}, values);
  } else {
    unpack(elements, values);
  }
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

// x / by for many x: the divisor's reciprocal once, and for each x a product and two corrections by what is left over,
// of which the second finds what is nearest (Markstein, https://doi.org/10.1147/rd.341.0111: `inverse` is the nearest
// to 1 / by, and what is left over is exact). A division asks for a reciprocal, and whether it needs care, for each x:
// two instructions of a sixteenth of the rate.
//
// Where `by` lies in the range no step of that leaves the normal numbers, for quotients of 2^-11 and more; smaller ones
// are zeros as codes, however they are rounded.
struct Divider {
  float by, inverse;
  bool in_range;  // the same for all threads
  __device__ explicit Divider(float divisor)
      : by(divisor), inverse(1.0f / divisor), in_range(divisor >= 0x1p-60f && divisor <= 0x1p60f) {}

  __device__ __forceinline__ float operator()(float x) const {
    float quotient = x * inverse;
    quotient = fmaf(fmaf(-by, quotient, x), inverse, quotient);
    return fmaf(fmaf(-by, quotient, x), inverse, quotient);
  }
};

// Four codes of quotients by a divisor in the range, the first in the lowest byte. These are numbers up to LARGEST, in
// e4m3 also beyond, which become LARGEST.
__device__ __forceinline__ uint32_t four_codes(int8_t, const float* x, const Divider& divide) {
  uint32_t codes[4];  // in the lowest bytes: the sum's last bit is worth 1
#pragma unroll
  for (int i = 0; i < 4; ++i) codes[i] = __float_as_uint(divide(x[i]) + 0x1.8p23f);
  return __byte_perm(__byte_perm(codes[0], codes[1], 0x0040), __byte_perm(codes[2], codes[3], 0x0040), 0x5410);
}
__device__ __forceinline__ uint32_t four_codes(__nv_fp8_e4m3, const float* x, const Divider& divide) {
  float quotients[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) quotients[i] = copysignf(divide(x[i]), x[i]);  // -0 is lost
  return pack_e4m3(quotients[0], quotients[1], quotients[2], quotients[3]);
}

template <typename Q, int VEC>
__device__ __forceinline__ Pack<Q, VEC> codes_of(const float (&values)[VEC], const Divider& divide) {
  Pack<Q, VEC> codes;
  if (VEC % 4 == 0 && divide.in_range) {
    uint32_t words[(VEC + 3) / 4];
#pragma unroll
    for (int i = 0; i < VEC / 4; ++i) words[i] = four_codes(Q(), values + 4 * i, divide);
    __builtin_memcpy(&codes, words, sizeof(codes));
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) codes.words[i] = Code<Q>::of(values[i] / divide.by);
  }
  return codes;
}

template <typename Q, typename T, int VEC>
__device__ __forceinline__ Pack<Q, VEC> codes_of(const Pack<T, VEC>& elements, const Divider& divide) {
  float values[VEC];
  unpack(elements, values);
  return codes_of<Q>(values, divide);
}

}  // namespace fastattn
