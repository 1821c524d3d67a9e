// Against registers that a loop does not need.
#pragma once

#include <cstdint>

namespace fastattn {

// Hides from the compiler what a value is, so that what follows from it is computed where it is used, and not once
// before the loop and then kept in registers through it.
__device__ __forceinline__ int32_t recompute(int32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace fastattn
