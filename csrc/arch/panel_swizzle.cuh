// The swizzle of panels in shared memory that TMA writes and wgmma reads.
#pragma once

#include <cstdint>

namespace fastattn {

// Where byte `offset` of a panel with rows of PANEL_BYTES lies, as TMA writes and wgmma reads it.
template <int PANEL_BYTES>
__device__ __forceinline__ uint32_t swizzled(uint32_t offset) {
  static_assert(PANEL_BYTES == 128 || PANEL_BYTES == 64);
  return offset ^ ((offset >> 3) & (PANEL_BYTES == 128 ? 0x70u : 0x30u));
}

}  // namespace fastattn
