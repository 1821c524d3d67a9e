// Conversion to and from fp8 (e4m3).
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "arch/e4m3_round.cuh"

namespace fastattn {

// Two values in the lower half, the lowest byte first; above 448 they become 448.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b) {
#if __CUDA_ARCH__ < 890
  return round_e4m3(a) | round_e4m3(b) << 8;
#else
  uint16_t half;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;\n" : "=h"(half) : "f"(a), "f"(b));
  return half;
#endif
}

// Four values, the lowest byte first; above 448 they become 448.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
#if __CUDA_ARCH__ < 890
  return round_e4m3(a) | round_e4m3(b) << 8 | round_e4m3(c) << 16 | round_e4m3(d) << 24;
#else
  uint32_t word;  // in one statement: the second conversion then fills the half that the first has left
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}\n"
      : "=r"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return word;
#endif
}

// The same of four in fp16, two of them a register.
__device__ __forceinline__ uint32_t pack_e4m3_pairs(uint32_t low, uint32_t high) {
  uint32_t word;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 low, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 high, %2;\n"
      "mov.b32 %0, {low, high};\n"
      "}\n"
      : "=r"(word)
      : "r"(low), "r"(high));
  return word;
}

// Four values as fp16, which holds them exactly: the two lowest bytes, then the others.
__device__ __forceinline__ void unpack_e4m3(uint32_t (&pairs)[2], uint32_t four) {
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(pairs[0]) : "h"(static_cast<uint16_t>(four)));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(pairs[1]) : "h"(static_cast<uint16_t>(four >> 16)));
#else
  // With exponent and mantissa where fp16 has them it is 2^-8 of the number, also below the normal ones. But NaN is
  // 480.
  constexpr unsigned kHighBytes[] = {0x1404, 0x3424};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t bits = __byte_perm(four, 0, kHighBytes[i]);
    const uint32_t small = (bits & 0x80008000u) | (bits & 0x7f007f00u) >> 1;
    const __half2 pair = __hmul2(*reinterpret_cast<const __half2*>(&small), __float2half2_rn(256.0f));
    pairs[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
#endif
}

}  // namespace fastattn
