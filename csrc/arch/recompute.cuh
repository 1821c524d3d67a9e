// Which values a loop keeps in registers, and which it does not.
#pragma once

#include <cstdint>

namespace fastattn {

// Hides from the compiler what a value is, so that what follows from it is computed where it is used, and not once
// before the loop and then kept in registers through it.
__device__ __forceinline__ int32_t recompute(int32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The opposite: a value that is kept in a register, since the compiler no longer knows what it could be had from again.
__device__ __forceinline__ uint32_t computed_once(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

}  // namespace fastattn
