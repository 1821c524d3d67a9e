// Reductions over a warp and over a CTA, in an order that depends on the number of threads only.
#pragma once

#include <cstdint>

namespace fastattn {

// Every lane gets the result. Combine is associative and commutative up to rounding.
template <typename V, typename Combine>
__device__ __forceinline__ V warp_reduce(V value, Combine combine) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// Every thread gets the result. blockDim.x is a multiple of 32; all threads call. `identity` is combine's neutral
// element. May be called again at once: the barrier at its start ends the readers of the call before. It is left out
// with a TURN, 0 or 1, that the call before did not have.
template <int TURN = -1, typename V, typename Combine>
__device__ __forceinline__ V block_reduce(V value, V identity, Combine combine) {
  static __shared__ V warp_values[32];
  value = warp_reduce(value, combine);
  if (blockDim.x == 32) return value;
  const int lane = threadIdx.x % 32;
  if constexpr (TURN < 0) __syncthreads();
  if (lane == 0) warp_values[threadIdx.x / 32] = value;
  __syncthreads();
  // Every warp reduces the warps' values, which saves a third barrier.
  return warp_reduce(lane < blockDim.x / 32 ? warp_values[lane] : identity, combine);
}

template <int TURN = -1>
__device__ __forceinline__ float block_sum(float value) {
  return block_reduce<TURN>(value, 0.0f, [](float a, float b) { return a + b; });
}

}  // namespace fastattn
