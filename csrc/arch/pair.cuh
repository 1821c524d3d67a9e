// Two neighbouring elements of 16 bits in a register.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastattn {

// Rounds two fp32 values to T and packs them, `low` into the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair);

// By hand, since of the header's conversion the compiler makes twice the instructions.
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// The larger of `a`, which are magnitudes, and those of `b`, of each half: of either type, their bits are ordered as
// integers are.
__device__ __forceinline__ uint32_t max_magnitudes(uint32_t a, uint32_t b) { return __vmaxu2(a, b & 0x7fff7fffu); }

// Where which of the two an element is shows at run time only.
__device__ __forceinline__ uint32_t pack_pair_as(bool fp16, float low, float high) {
  return fp16 ? pack_pair<__half>(low, high) : pack_pair<__nv_bfloat16>(low, high);
}

__device__ __forceinline__ float2 unpack_pair_as(bool fp16, uint32_t pair) {
  return fp16 ? unpack_pair<__half>(pair) : unpack_pair<__nv_bfloat16>(pair);
}

}  // namespace fastattn
