// Conversions to and from fp32, and loads and stores of VEC neighbouring elements in one instruction.
#pragma once

#include <cstdint>
#include <type_traits>

#include "arch/global_memory.cuh"
#include "arch/pair.cuh"

namespace fastattn {

template <typename T>
__device__ __forceinline__ float to_float(T value) {
  return static_cast<float>(value);
}

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T round_to(float value) {
  return static_cast<T>(value);
}

// VEC neighbouring elements as they lie in memory. Pairs of 16 bits stay in one register: of single ones the compiler
// keeps each in its own, and moves them there.
template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  static constexpr bool IN_PAIRS = sizeof(T) == 2 && VEC % 2 == 0;
  using Word = std::conditional_t<IN_PAIRS, uint32_t, T>;
  Word words[IN_PAIRS ? VEC / 2 : VEC];
};

// `source` is aligned to VEC elements.
template <int VEC, typename T>
__device__ __forceinline__ Pack<T, VEC> load_pack(const T* source) {
  return *reinterpret_cast<const Pack<T, VEC>*>(source);
}

// The same, asked for before all that stands behind it (arch/global_memory.cuh), if it is 16 bytes.
template <int VEC, typename T>
__device__ __forceinline__ Pack<T, VEC> load_pack_early(const T* source) {
  if constexpr (sizeof(Pack<T, VEC>) == sizeof(uint4)) {
    const uint4 words = load_early(reinterpret_cast<const uint4*>(source));
    return *reinterpret_cast<const Pack<T, VEC>*>(&words);
  } else {
    return load_pack<VEC>(source);
  }
}

template <int VEC, typename T>
__device__ __forceinline__ void unpack(const Pack<T, VEC>& pack, float (&values)[VEC]) {
  if constexpr (Pack<T, VEC>::IN_PAIRS) {
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) {
      const float2 pair = unpack_pair<T>(pack.words[i]);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) values[i] = to_float(pack.words[i]);
  }
}

// Rounds once.
template <typename T, int VEC>
__device__ __forceinline__ Pack<T, VEC> packed(const float (&values)[VEC]) {
  Pack<T, VEC> pack;
  if constexpr (Pack<T, VEC>::IN_PAIRS) {
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) pack.words[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < VEC; ++i) pack.words[i] = round_to<T>(values[i]);
  }
  return pack;
}

// VEC times the same.
template <typename T, int VEC>
__device__ __forceinline__ Pack<T, VEC> pack_of(float value) {
  float values[VEC];
#pragma unroll
  for (float& each : values) each = value;
  return packed<T>(values);
}

template <int VEC, typename T>
__device__ __forceinline__ void load_vec(const T* source, float (&values)[VEC]) {
  unpack(load_pack<VEC>(source), values);
}

// `target` is aligned to VEC elements.
template <int VEC, typename T>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, VEC>& pack) {
  *reinterpret_cast<Pack<T, VEC>*>(target) = pack;
}

// Rounds once; `target` is aligned to VEC elements.
template <int VEC, typename T>
__device__ __forceinline__ void store_vec(T* target, const float (&values)[VEC]) {
  store_pack<VEC>(target, packed<T>(values));
}

}  // namespace fastattn
