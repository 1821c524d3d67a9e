// Rounding to fp8 (e4m3) where the GPU has no instruction for it: before sm_89.
#pragma once

#include <cstdint>

namespace fastattn {

// The code of the nearest e4m3, ties to even; beyond 448 that of 448, of NaN a NaN.
__device__ __forceinline__ uint32_t round_e4m3(float x) {
  const uint32_t sign = __float_as_uint(x) >> 24 & 0x80u;
  if (x != x) return sign | 0x7fu;
  const float magnitude = fminf(fabsf(x), 448.0f);
  // 2^20 times the power of two below it: a float of that size steps by an eighth of that power, as e4m3 does. Below
  // 2^-6 the step stays that of 2^-6.
  const uint32_t exponent = max(__float_as_uint(magnitude) & 0x7f800000u, 0x3c800000u);
  const float large = __uint_as_float(exponent + (20u << 23));
  const float rounded = __fsub_rn(__fadd_rn(magnitude, large), large);
  // With e4m3's smaller bias the exponent and three bits are the code, also where it is 0.
  return sign | __float_as_uint(__fmul_rn(rounded, 0x1p-120f)) >> 20;
}

}  // namespace fastattn
