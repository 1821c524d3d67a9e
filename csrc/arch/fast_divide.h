// Division by a run-time constant as one multiplication and one shift: the divisor (page size,
// GQA group) is known on the host, the dividends are not, and a device division costs 20
// instructions.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTATTN_HOST_DEVICE __host__ __device__
#else
#define FASTATTN_HOST_DEVICE
#endif

namespace fastattn {

// n / d for 0 <= n < 2^31, 1 <= d < 2^31. With l = ceil(log2 d) and m = ceil(2^(31+l) / d) the error
// m * d - 2^(31+l) is below d <= 2^l, so floor(n * m / 2^(31+l)) is exact (Granlund, Montgomery).
struct FastDivide {
  int32_t divisor = 1;
  uint32_t multiplier = 0x80000000u;
  uint32_t shift = 31;

  FastDivide() = default;
  explicit FastDivide(int32_t d) : divisor(d) {
    uint32_t log2_ceil = 0;
    while ((uint64_t{1} << log2_ceil) < static_cast<uint64_t>(d)) ++log2_ceil;
    shift = 31 + log2_ceil;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + d - 1) / d);
  }

  FASTATTN_HOST_DEVICE int32_t divide(int32_t n) const {
    return static_cast<int32_t>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier) >> shift);
  }
  FASTATTN_HOST_DEVICE int32_t remainder(int32_t n) const { return n - divide(n) * divisor; }
};

}  // namespace fastattn
