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

template <typename Storage>
Storage& shared_storage_of_128() {
  return shared_storage<Storage>();
}

template <typename Storage>
Storage& shared_storage_of_1024() {
  return shared_storage<Storage>();
}

inline int32_t load_shared(uint32_t address) {
  int32_t value;
  std::memcpy(&value, emulator::smem_of(emulator::this_rank()) + address, sizeof(value));
  return value;
}

inline float2 load_shared_pair(uint32_t address) {
  float2 value;
  std::memcpy(&value, emulator::smem_of(emulator::this_rank()) + address, sizeof(value));
  return value;
}

inline uint2 load_shared_8_bytes(uint32_t address) {
  if (address % 8 != 0) emulator::fail("8 bytes from an address that is not a multiple of 8");
  uint2 value;
  std::memcpy(&value, emulator::smem_of(emulator::this_rank()) + address, sizeof(value));
  return value;
}

inline uint4 load_shared_16_bytes(uint32_t address) {
  if (address % 16 != 0) emulator::fail("16 bytes from an address that is not a multiple of 16");
  uint4 value;
  std::memcpy(&value, emulator::smem_of(emulator::this_rank()) + address, sizeof(value));
  return value;
}

inline uint32_t load_shared_2_bytes(uint32_t address) {
  uint16_t value;
  std::memcpy(&value, emulator::smem_of(emulator::this_rank()) + address, sizeof(value));
  return value;
}

inline void store_shared_16_bytes(uint32_t address, const uint4& value) {
  if (address % 16 != 0) emulator::fail("16 bytes to an address that is not a multiple of 16");
  std::memcpy(emulator::smem_of(emulator::this_rank()) + address, &value, sizeof(value));
}

inline void store_shared(uint32_t address, uint32_t value) {
  std::memcpy(emulator::smem_of(emulator::this_rank()) + address, &value, sizeof(value));
}

}  // namespace fastattn
