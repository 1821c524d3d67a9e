// Registers: a fibre has as many as it likes.
#pragma once

#include "device.h"

namespace fastattn {

template <int NUM_REGISTERS>
void give_registers() {}
template <int NUM_REGISTERS>
void take_registers() {}

inline uint32_t uniform_value(uint32_t value) {
  for (uint32_t other : emulator::exchange(value)) {
    if (other != value) emulator::fail("lanes disagree about a value that must be the warp's");
  }
  return value;
}

}  // namespace fastattn
