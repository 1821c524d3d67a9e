// Shared memory by its 32-bit addresses, which is what the PTX instructions take.
#pragma once

#include <cstdint>

namespace fastattn {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// All of a CTA's shared memory, which the launch must give 1024 bytes more than this takes: swizzled tiles begin at
// multiples of that.
template <typename Storage>
__device__ __forceinline__ Storage& shared_storage() {
  extern __shared__ unsigned char smem_bytes[];
  return *reinterpret_cast<Storage*>((reinterpret_cast<uintptr_t>(smem_bytes) + 1023) & ~uintptr_t{1023});
}

// The same for what needs no more than 128, and without the addition: so the compiler knows that it is shared memory.
template <typename Storage>
__device__ __forceinline__ Storage& shared_storage_of_128() {
  static_assert(alignof(Storage) <= 128);
  extern __shared__ __align__(128) unsigned char smem_bytes_of_128[];
  return *reinterpret_cast<Storage*>(smem_bytes_of_128);
}

// The same for swizzled tiles, where the CTA has no other shared memory: addresses in it are constants.
template <typename Storage>
__device__ __forceinline__ Storage& shared_storage_of_1024() {
  extern __shared__ __align__(1024) unsigned char smem_bytes_of_1024[];
  return *reinterpret_cast<Storage*>(smem_bytes_of_1024);
}

// A load that the compiler does not keep the result of, or move.
__device__ __forceinline__ int32_t load_shared(uint32_t address) {
  int32_t value;
  asm volatile("ld.shared.s32 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint4 load_shared_16_bytes(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ uint2 load_shared_8_bytes(uint32_t address) {
  uint2 value;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];\n" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_shared_2_bytes(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u16 %0, [%1];\n" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_16_bytes(uint32_t address, const uint4& value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(address), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}

}  // namespace fastattn
