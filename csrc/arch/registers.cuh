// How many registers a thread has, and which of them the threads of a warp share.
#pragma once

#include <cstdint>

namespace fastattn {

// By whole warp groups: from here on a thread has so many registers, fewer than before, or more of those that others
// have given away.
template <int NUM_REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(NUM_REGISTERS));
}
template <int NUM_REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(NUM_REGISTERS));
}

// A value that is the same in all threads of a warp, in a register that the compiler knows to be the warp's.
__device__ __forceinline__ uint32_t uniform_value(uint32_t value) {
  uint32_t uniform;
  asm volatile("shfl.sync.idx.b32 %0, %1, 0, 0x1f, 0xffffffff;\n" : "=r"(uniform) : "r"(value));
  return uniform;
}

}  // namespace fastattn
