// Bytes of registers as tables and as addresses.
#pragma once

#include "device.h"

namespace fastattn {

inline uint32_t look_up_bytes(const uint2& table, uint32_t selector) {
  if ((selector & 0x8888u) != 0) emulator::fail("a selector of bytes with a fourth bit, which asks for signs");
  return __byte_perm(table.x, table.y, selector);
}

inline uint32_t address_of_eight(uint32_t base, uint32_t word, int idx) { return base + 8 * (word >> 8 * idx & 0xff); }

}  // namespace fastattn
