// Policies for the L2 cache. What comes in as the first to go takes the place of its like, and leaves what others wrote
// there, which costs the memory a write for each line that has to go, and what they will read again.
#pragma once

#include <cstdint>

namespace fastattn {

__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ uint64_t evict_normal_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;\n" : "=l"(policy));
  return policy;
}

}  // namespace fastattn
