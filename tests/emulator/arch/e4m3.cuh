// Conversion to fp8 (e4m3).
#pragma once

#include "device.h"

namespace fastattn {

inline uint32_t pack_e4m3(float a, float b, float c, float d) {
  const float values[4] = {a, b, c, d};
  uint32_t packed = 0;
  for (int i = 0; i < 4; ++i) {
    packed |= static_cast<uint32_t>(__nv_cvt_float_to_fp8(values[i], __NV_SATFINITE, __NV_E4M3)) << 8 * i;
  }
  return packed;
}

}  // namespace fastattn
