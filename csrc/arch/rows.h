// Where the rows of a tensor of up to three dimensions begin: all strides but the last are free.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arch/fast_divide.h"

namespace fastattn {

// Row r begins at (r / inner) * outer_stride + (r % inner) * inner_stride elements; rows in one run have inner = how
// many there are.
struct Rows {
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
  FastDivide inner_div;

  Rows() = default;
  Rows(int64_t num_inner, int64_t outer_stride_, int64_t inner_stride_)
      : outer_stride(outer_stride_),
        inner_stride(inner_stride_),
        inner_div(static_cast<int32_t>(std::clamp<int64_t>(num_inner, 1, INT32_MAX))) {}

  int64_t inner() const { return inner_div.divisor; }

  FASTATTN_HOST_DEVICE int64_t offset(int32_t row) const {
    const int32_t outer = inner_div.divide(row);
    return outer * outer_stride + (row - outer * inner_div.divisor) * inner_stride;
  }
};

// Whether every row of 16-bit elements begins at a multiple of 16 bytes, so that 8 elements are one load.
inline bool aligned_rows(const void* base, const Rows& rows = {}) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && rows.outer_stride % 8 == 0 && rows.inner_stride % 8 == 0;
}

}  // namespace fastattn
