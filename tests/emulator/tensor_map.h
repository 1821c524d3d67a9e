// What the driver makes of a tensor for the copy engine, and the swizzle in which that writes and wgmma reads.
#pragma once

#include <cuda.h>

#include "device.h"

namespace emulator {

struct TensorMap {
  const unsigned char* base;
  int64_t sizes[5];    // of a map of four dimensions the last is 1
  int64_t strides[5];  // bytes
  int box[5];          // elements
  uint16_t rank;
  uint16_t element_bytes;

  int num_rows() const { return box[1] * box[2] * box[3] * box[4]; }

  // A row of the box that begins at these elements; zeros outside the tensor.
  void read_row(const std::array<int32_t, 5>& first, int idx, unsigned char* target) const {
    std::memset(target, 0, box[0] * element_bytes);
    const unsigned char* row = base;
    for (int i = 1; i < 5; idx /= box[i++]) {
      const int64_t at = int64_t{first[i]} + idx % box[i];
      if (at < 0 || at >= sizes[i]) return;
      row += at * strides[i];
    }
    const int64_t x = first[0], begin = std::max<int64_t>(x, 0), end = std::min(x + box[0], sizes[0]);
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
