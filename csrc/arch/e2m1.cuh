// Codes of 4 bits, two in a byte (the low half first), to pairs of bf16 or fp16; and the 8-bit scales of FP4's groups.
//
// No table and no conversion instruction: the bits of a code are put where the bits of the wider number are, and one
// exact multiplication or subtraction by a constant makes the number of it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace fastattn {

// Two numbers of type T, the lower column in the low half, as fragments of mma want them.
template <typename T>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};
template <typename T>
using Pair = typename PairOf<T>::Type;

template <typename T>
__device__ __forceinline__ Pair<T> as_pair(uint32_t bits) {
  return *reinterpret_cast<const Pair<T>*>(&bits);
}

template <typename T>
__device__ __forceinline__ uint32_t bits_of(Pair<T> pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ __forceinline__ Pair<T> both(T value) {
  return Pair<T>(value, value);
}

// E2M1 (a sign, two bits of exponent, one of mantissa) in the low 8 bits of `byte` as numbers 0, 0.5 ... 6. Its bits as
// those of T are the number times 2^-126 (bf16) or 2^-14 (fp16), E2M1's one subnormal included.
template <typename T>
__device__ __forceinline__ Pair<T> e2m1_pair(uint32_t byte);

template <>
__device__ __forceinline__ __nv_bfloat162 e2m1_pair<__nv_bfloat16>(uint32_t byte) {
  const uint32_t bits = (byte & 0x07) << 6 | (byte & 0x08) << 12 | (byte & 0x70) << 18 | (byte & 0x80) << 24;
  return __hmul2(as_pair<__nv_bfloat16>(bits), as_pair<__nv_bfloat16>(0x7e807e80u));
}

template <>
__device__ __forceinline__ __half2 e2m1_pair<__half>(uint32_t byte) {
  const uint32_t bits = (byte & 0x07) << 9 | (byte & 0x08) << 12 | (byte & 0x70) << 21 | (byte & 0x80) << 24;
  return __hmul2(as_pair<__half>(bits), as_pair<__half>(0x74007400u));
}

// Unsigned codes 0 ... 15 in the low 8 bits of `byte`, plus kUint4Base: the codes are the last bits of its mantissa.
template <typename T>
constexpr int kUint4Base = 0;
template <>
constexpr int kUint4Base<__nv_bfloat16> = 128;
template <>
constexpr int kUint4Base<__half> = 1024;

template <typename T>
__device__ __forceinline__ Pair<T> uint4_pair(uint32_t byte) {
  constexpr uint32_t kBaseBits = kUint4Base<T> == 128 ? 0x43004300u : 0x64006400u;
  return as_pair<T>((byte & 0x0f) | (byte & 0xf0) << 12 | kBaseBits);
}

// The low 8 bits of `bits` as e4m3: exact in fp16, and so in bf16.
template <typename T>
__device__ __forceinline__ T from_e4m3(uint8_t bits) {
  const __half value(__nv_cvt_fp8_to_halfraw(bits, __NV_E4M3));
  return static_cast<T>(static_cast<float>(value));
}

// 2^(bits - 127), 255 is NaN; fp16 makes infinity or zero of what it cannot hold.
template <typename T>
__device__ __forceinline__ T from_e8m0(uint8_t bits) {
  const uint32_t float_bits = bits == 0 ? 0x00400000u : bits == 255 ? 0x7fc00000u : static_cast<uint32_t>(bits) << 23;
  return static_cast<T>(__uint_as_float(float_bits));
}

}  // namespace fastattn
