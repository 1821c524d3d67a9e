// Shared memory by its addresses, which begin at 0 here.
#pragma once

#include "device.h"

namespace fastattn {

inline uint32_t shared_address(const void* pointer) {
  const int64_t address = static_cast<const unsigned char*>(pointer) - emulator::smem_of(emulator::this_rank());
  if (address < 0 || address >= emulator::kMaxSmemBytes) emulator::fail("an address outside shared memory");
  return static_cast<uint32_t>(address);
}

template <typename Storage>
Storage& shared_storage() {
  return *reinterpret_cast<Storage*>(emulator::smem_of(emulator::this_rank()));
}

}  // namespace fastattn
