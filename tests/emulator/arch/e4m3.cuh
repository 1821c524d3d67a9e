// Conversion to and from fp8 (e4m3).
#pragma once

#include "arch/e4m3_round.cuh"
#include "device.h"

namespace fastattn {

// As sm_90 does it, which must be as sm_80 does.
inline uint32_t pack_e4m3(float a, float b) {
  const float values[2] = {a, b};
  uint32_t packed = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t code = __nv_cvt_float_to_fp8(values[i], __NV_SATFINITE, __NV_E4M3);
    if (code != round_e4m3(values[i]) && values[i] == values[i]) {
      emulator::fail("round_e4m3 of " + std::to_string(values[i]) + " is not the nearest e4m3");
    }
    packed |= code << 8 * i;
  }
  return packed;
}
inline uint32_t pack_e4m3(float a, float b, float c, float d) { return pack_e4m3(a, b) | pack_e4m3(c, d) << 16; }

inline uint32_t pack_e4m3_pairs(uint32_t low, uint32_t high) {
  const uint16_t halves[4] = {static_cast<uint16_t>(low), static_cast<uint16_t>(low >> 16), static_cast<uint16_t>(high),
                              static_cast<uint16_t>(high >> 16)};
  float values[4];
  for (int i = 0; i < 4; ++i) values[i] = emulator::value_at<__half>(halves + i);
  return pack_e4m3(values[0], values[1], values[2], values[3]);
}

inline void unpack_e4m3(uint32_t (&pairs)[2], uint32_t four) {
  for (int i = 0; i < 4; ++i) {
    const __half value(emulator::value_at<__nv_fp8_e4m3>(reinterpret_cast<const char*>(&four) + i));
    std::memcpy(reinterpret_cast<char*>(pairs) + 2 * i, &value, 2);
  }
}

}  // namespace fastattn
