// cp.async: copies from global to shared memory that bypass the registers and complete in groups.
//
// The rule that every pipeline here follows: commit one group per step even if it is empty. Then
// "all but the newest N groups are done" means the same thing in the middle and at the tail.
#pragma once

#include <cstdint>

#include "arch/cache_policy.cuh"
#include "arch/mma_sm80.cuh"

namespace fastattn {

// Copies 16 bytes, or writes 16 zero bytes if `valid` is false; then `source` is not read. Both
// addresses must be multiples of 16. L2 only (.cg): tiles are read once per CTA.
__device__ __forceinline__ void cp_async_16(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_16(void* destination, const void* source, bool valid) {
  cp_async_16(shared_address(destination), source, valid);
}

// The same for one value of 4 bytes.
__device__ __forceinline__ void cp_async_4(void* destination, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(destination)), "l"(source),
               "r"(valid ? 4 : 0)
               : "memory");
}

// cp_async_16 with a policy of arch/cache_policy.cuh.
__device__ __forceinline__ void cp_async_16(void* destination, const void* source, bool valid, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;\n" ::"r"(shared_address(destination)),
               "l"(source), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
}

// The same where `valid` is not 0. If it is a bit of another integer, the compiler tests that in one instruction.
__device__ __forceinline__ void cp_async_16_if(uint32_t destination, const void* source, uint32_t valid,
                                               uint64_t policy) {
  asm volatile(
      "{\n"
      ".reg .pred ignore;\n"
      "setp.eq.u32 ignore, %2, 0;\n"
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, ignore, %3;\n"
      "}\n" ::"r"(destination),
      "l"(source), "r"(valid), "l"(policy)
      : "memory");
}

// Closes the group of all copies this thread has issued since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most PENDING of this thread's newest groups are unfinished. Other threads' copies
// are visible only after a barrier that follows.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

}  // namespace fastattn
