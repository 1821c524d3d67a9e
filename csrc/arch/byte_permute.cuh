// Bytes of registers as tables and as addresses.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastattn {

// Four of the eight bytes of a table, by the three lower bits of the selector's four lowest halves of bytes, whose
// fourth bits are 0. __byte_perm would clear those first, and again where the selector has been made of half a word.
__device__ __forceinline__ uint32_t look_up_bytes(const uint2& table, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(bytes) : "r"(table.x), "r"(table.y), "r"(selector));
  return bytes;
}

// base + 8 * byte `idx` of the word, in one instruction.
__device__ __forceinline__ uint32_t address_of_eight(uint32_t base, uint32_t word, int idx) {
  return __dp4a(word, 8u << 8 * idx, base);
}

}  // namespace fastattn
