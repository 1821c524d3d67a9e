// Results that CTAs hand to each other through the L2 cache, each with its mark: who reads asks for the data itself
// until it has the mark that it waits for (the LL protocol of NCCL).
#pragma once

#include <cstdint>

namespace fastattn {

__device__ __forceinline__ void hand_over(uint32_t* target, uint32_t value, uint32_t mark) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};\n" ::"l"(target), "r"(value), "r"(mark) : "memory");
}

__device__ __forceinline__ void hand_over(uint32_t* target, float first, float second, uint32_t mark) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %2};\n" ::"l"(target), "r"(__float_as_uint(first)),
               "r"(mark), "r"(__float_as_uint(second))
               : "memory");
}

__device__ __forceinline__ uint4 look(const uint32_t* source) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source)
               : "memory");
  return v;
}

// Two words with their marks, as soon as they are there; v is what the first look saw.
__device__ __forceinline__ uint2 take(const uint32_t* source, uint32_t mark, uint4 v) {
  while (v.y != mark || v.w != mark) v = look(source);
  return make_uint2(v.x, v.z);
}

}  // namespace fastattn
