// Floats as integers of the same order, and the best of a row by value and then by lowest id.
#pragma once

#include <cstdint>

namespace fastattn {

// a < b as floats is ordered(a) < ordered(b); -0 and +0 are equal; NaN with the sign bit clear is above +inf.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 + 0 = +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Larger for a larger value, and among equal values for a lower id. Never 0, which stands for "none".
__device__ __forceinline__ uint64_t ranked(float x, int32_t id) {
  return static_cast<uint64_t>(ordered(x)) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

__device__ __forceinline__ float ranked_value(uint64_t rank) {
  const uint32_t key = static_cast<uint32_t>(rank >> 32);
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

__device__ __forceinline__ int32_t ranked_id(uint64_t rank) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(rank));
}

}  // namespace fastattn
