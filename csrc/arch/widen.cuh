// Numbers of 8 bits to fp16, which holds every one of them exactly.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "arch/e2m1.cuh"
#include "arch/e4m3.cuh"

namespace fastattn {

// Four of a register as pairs: the two lowest bytes, then the others.
template <typename T>
__device__ __forceinline__ void widen(uint32_t (&pairs)[2], uint32_t four);

template <>
__device__ __forceinline__ void widen<__nv_fp8_e4m3>(uint32_t (&pairs)[2], uint32_t four) {
  unpack_e4m3(pairs, four);
}

// A byte b of 0 … 255 under the bits of 1024 is 1024 + b; with 128 added to make an int8 such a byte, 1152 are too
// many.
template <>
__device__ __forceinline__ void widen<int8_t>(uint32_t (&pairs)[2], uint32_t four) {
  constexpr uint32_t k1024 = 0x64006400u, k1152 = 0x64806480u;
  const uint32_t unsigned_four = four ^ 0x80808080u;
  pairs[0] =
      bits_of<__half>(__hsub2(as_pair<__half>(__byte_perm(unsigned_four, k1024, 0x7170)), as_pair<__half>(k1152)));
  pairs[1] =
      bits_of<__half>(__hsub2(as_pair<__half>(__byte_perm(unsigned_four, k1024, 0x7372)), as_pair<__half>(k1152)));
}

}  // namespace fastattn
