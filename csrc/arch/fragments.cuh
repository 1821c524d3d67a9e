// Rounding, packing and regrouping of the tensor cores' fragments (their layout: arch/mma_sm80.cuh).
#pragma once

#include <cstdint>

#include "arch/pair.cuh"

namespace fastattn {

// Two columns each of four neighbouring C tiles, rounded, which the four lanes of a row hold: after this, a lane has
// all eight columns of tile l % 4, 16 bytes of the row. By whole warps.
__device__ __forceinline__ void gather_columns(uint32_t (&w)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1);
  uint32_t b = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
  (odd ? w[0] : w[1]) = a;
  (odd ? w[2] : w[3]) = b;
  a = __shfl_xor_sync(0xffffffffu, high ? w[0] : w[2], 2);
  b = __shfl_xor_sync(0xffffffffu, high ? w[1] : w[3], 2);
  (high ? w[0] : w[2]) = a;
  (high ? w[1] : w[3]) = b;
}

}  // namespace fastattn
