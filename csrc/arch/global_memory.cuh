// What threads of different CTAs say to each other through device memory.
#pragma once

#include <cstdint>

namespace fastattn {

// Adds 16 bytes of floats to memory; no other thread of the grid loses its addition.
__device__ __forceinline__ void add_to_global(float* address, const float (&values)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"l"(address), "f"(values[0]),
               "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}

// Asked for here. The compiler moves a load of its own down to where the value is used, and of several with
// conditions makes one latency of memory after the other.
__device__ __forceinline__ uint4 load_early(const uint4* address) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address));
  return value;
}

__device__ __forceinline__ int32_t load_early(const int32_t* address) {
  int32_t value;
  asm volatile("ld.global.s32 %0, [%1];\n" : "=r"(value) : "l"(address));
  return value;
}

// 16 bytes past the first-level cache, with a policy of arch/cache_policy.cuh; if not `wanted`, anything. Not a branch,
// behind which other loads would wait for the condition. With whole_row, L2 asks the memory at once for all 256 bytes
// in which they lie.
__device__ __forceinline__ uint4 load_if(bool wanted, const void* address, uint64_t policy, bool whole_row) {
  uint4 value;
#define FASTATTN_LOAD_IF(hint)                                     \
  asm volatile(                                                    \
      "{\n"                                                        \
      ".reg .pred wanted;\n"                                       \
      "setp.ne.u32 wanted, %6, 0;\n"                               \
      "@wanted ld.global.L1::no_allocate.L2::cache_hint" hint      \
      ".v4.u32 {%0, %1, %2, %3}, [%4], %5;\n"                      \
      "}\n"                                                        \
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) \
      : "l"(address), "l"(policy), "r"(static_cast<uint32_t>(wanted)))
  if (whole_row) {
    FASTATTN_LOAD_IF(".L2::256B");
  } else {
    FASTATTN_LOAD_IF("");
  }
#undef FASTATTN_LOAD_IF
  return value;
}

// Where the compiler should branch, and not select each word.
__device__ __forceinline__ void clear(uint4& value) {
  asm volatile("mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w));
}

__device__ __forceinline__ int32_t load_acquire(const int32_t* address) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];\n" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Counts up, to 2^31 - 1, and gives what was there before. An increment that ends somewhere and not an addition: of
// additions by lanes the assembler makes one for the warp, and then waits for its result at once.
__device__ __forceinline__ int32_t count_up(int32_t* address) {
  int32_t before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], 0x7fffffff;\n" : "=r"(before) : "l"(address) : "memory");
  return before;
}

__device__ __forceinline__ void add_release(int32_t* address, int32_t value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;\n" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];\n" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(uint64_t* address, uint64_t value) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;\n" ::"l"(address), "l"(value) : "memory");
}

// Asks for the line of an address in the L2 cache; nothing waits for it.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(address));
}

}  // namespace fastattn
