// What the driver makes of a tensor for the copy engine, and the swizzle in which that writes and wgmma reads.
#pragma once

#include <cuda.h>

#include "device.h"

namespace emulator {

struct TensorMap {
  const unsigned char* base;
  int64_t sizes[4];
  int64_t strides[4];  // bytes
  int box[3];          // elements of the first three dimensions
  int element_bytes;

  // A row of the box; zeros outside the tensor.
  void read_row(int64_t x, int64_t y, int64_t z, int64_t w, unsigned char* target) const {
    std::memset(target, 0, box[0] * element_bytes);
    const int64_t at[4] = {0, y, z, w};
    const unsigned char* row = base;
    for (int i = 1; i < 4; ++i) {
      if (at[i] < 0 || at[i] >= sizes[i]) return;
      row += at[i] * strides[i];
    }
    const int64_t begin = std::max<int64_t>(x, 0), end = std::min(x + box[0], sizes[0]);
    if (begin >= end) return;
    std::memcpy(target + (begin - x) * element_bytes, row + begin * element_bytes, (end - begin) * element_bytes);
  }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

inline TensorMap read_tensor_map(const CUtensorMap& map) {
  TensorMap result;
  std::memcpy(&result, &map, sizeof(result));
  return result;
}

// Of an address in shared memory, in rows of 128 or 64 bytes: 16-byte chunks change places within eight rows. Others
// stay.
inline uint32_t swizzle(uint32_t address, int row_bytes) {
  return address ^ (address >> 3 & (row_bytes == 128 ? 0x70u : row_bytes == 64 ? 0x30u : 0u));
}

}  // namespace emulator
