// Conversions to and from fp32, and loads and stores of VEC neighbouring elements in one instruction.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
  T values[VEC];
};

// `source` is aligned to VEC elements.
template <int VEC, typename T>
__device__ __forceinline__ Pack<T, VEC> load_pack(const T* source) {
  return *reinterpret_cast<const Pack<T, VEC>*>(source);
}

template <int VEC, typename T>
__device__ __forceinline__ void unpack(const Pack<T, VEC>& pack, float (&values)[VEC]) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) values[i] = to_float(pack.values[i]);
}

template <int VEC, typename T>
__device__ __forceinline__ void load_vec(const T* source, float (&values)[VEC]) {
  unpack(load_pack<VEC>(source), values);
}

// Rounds once; `target` is aligned to VEC elements.
template <int VEC, typename T>
__device__ __forceinline__ void store_vec(T* target, const float (&values)[VEC]) {
  Pack<T, VEC> pack;
#pragma unroll
  for (int i = 0; i < VEC; ++i) pack.values[i] = round_to<T>(values[i]);
  *reinterpret_cast<Pack<T, VEC>*>(target) = pack;
}

}  // namespace fastattn
