// A pipeline's place in its ring of stages.
#pragma once

#include <cstdint>

namespace fastattn {

// Where a ring of stages stands: one number, since registers are short.
template <int STAGES>
struct RingPosition {
  uint32_t count = 0;
  __device__ __forceinline__ uint32_t stage() const { return count % STAGES; }
  __device__ __forceinline__ uint32_t parity() const { return count / STAGES % 2; }
  __device__ __forceinline__ void advance() { ++count; }
};

}  // namespace fastattn
