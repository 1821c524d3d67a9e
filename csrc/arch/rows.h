// Where the rows of a tensor of up to three dimensions begin: all strides but the last are free.
#pragma once

#include <cstdint>

#include "arch/fast_divide.h"

namespace fastattn {

// Row r begins at (r / inner) * outer_stride + (r % inner) * inner_stride elements. Rows in one run have inner = how
// many there are, and take no division.
struct Rows {
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;

  FASTATTN_HOST_DEVICE int64_t offset(int64_t row) const {
    if (row < inner) return row * inner_stride;
    const int64_t outer = row / inner;
    return outer * outer_stride + (row - outer * inner) * inner_stride;
  }
};

// Whether every row of 16-bit elements begins at a multiple of 16 bytes, so that 8 elements are one load.
inline bool aligned_rows(const void* base, const Rows& rows = {}) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && rows.outer_stride % 8 == 0 && rows.inner_stride % 8 == 0;
}

}  // namespace fastattn
