// What wgmma is told about an operand in shared memory.
#pragma once

#include <cstdint>

#include "arch/registers.cuh"
#include "arch/shared_memory.cuh"

namespace fastattn {

// A tile in shared memory as wgmma reads it: panels of 64 (or 32) elements, 128 (or 64) bytes a row, swizzled over
// 8 rows, so that a panel's base is 1024-byte aligned. Offsets are added to it in units of 16 bytes.
//
//   K-major (rows are M or N, the panel runs along K):  stride = bytes from 8 rows to the next 8
//   MN-major (rows are K, the panel runs along N):      the same, and leading = bytes from panel to panel
//
// A panel's rows lie behind each other; or, with BETWEEN panels, eight rows of each of so many do, and then the next.
struct WgmmaDescriptor {
  uint32_t low, high;

  template <int PANEL_BYTES, int BETWEEN = 1>
  __device__ __forceinline__ static WgmmaDescriptor make(const void* base, uint32_t leading_bytes) {
    static_assert(PANEL_BYTES == 128 || PANEL_BYTES == 64, "swizzles of 128 and 64 bytes");
    constexpr uint32_t kSwizzle = PANEL_BYTES == 128 ? 1 : 2;
    return {((shared_address(base) & 0x3ffff) >> 4) | ((leading_bytes & 0x3ffff) >> 4) << 16,
            (8 * PANEL_BYTES * BETWEEN) >> 4 | kSwizzle << 30};
  }

  // The same tile so many bytes further on. All threads agree on it, and the compiler is told: a descriptor is taken
  // from uniform registers, and moving what it must think divergent there takes longer than a product.
  __device__ __forceinline__ WgmmaDescriptor uniform_plus(uint32_t bytes) const {
    return {uniform_value(low + bytes / 16), high};
  }
  __device__ __forceinline__ uint64_t plus(uint32_t bytes) const {
    return static_cast<uint64_t>(high) << 32 | (low + bytes / 16);
  }
};

}  // namespace fastattn
