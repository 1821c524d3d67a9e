// The copy engine's tiled loads (device side). Maps are made on the host by arch/tensor_map.h.
#pragma once

#include <cuda.h>

#include "arch/cache_policy.cuh"
#include "arch/mbarrier.cuh"

namespace fastattn {

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// True in one lane of a whole warp. What takes its operands from the warp's registers, as a copy does, the compiler
// otherwise puts into a loop over the lanes that might be there, of 70 cycles for each that is.
__device__ __forceinline__ bool elect_lane() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred elected;\n"
      "elect.sync _|elected, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, elected;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

// One box of a 4-D tensor to shared memory; `barrier` gets the bytes, all of the box's even where it
// lies outside the tensor and is filled with zeros. By one thread.
__device__ __forceinline__ void tma_load_4d(void* destination, const CUtensorMap& map, MBarrier& barrier, int32_t x,
                                            int32_t y, int32_t z, int32_t w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier.state)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// The same where the map cuts rows into panels: all of them.
__device__ __forceinline__ void tma_load_whole_rows(void* destination, const CUtensorMap& map, MBarrier& barrier,
                                                    int32_t row, int32_t z, int32_t w) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %3, %5, %6}], "
      "[%2];\n" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier.state)), "r"(0), "r"(row), "r"(z), "r"(w)
      : "memory");
}

// tma_load_4d to all CTAs of the cluster whose bit is set, to the same place in each, whose barrier gets the bytes.
__device__ __forceinline__ void tma_load_4d_multicast(void* destination, const CUtensorMap& map, MBarrier& barrier,
                                                      int32_t x, int32_t y, int32_t z, int32_t w, uint16_t cta_mask) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;\n" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier.state)), "r"(x), "r"(y), "r"(z), "r"(w), "h"(cta_mask)
      : "memory");
}

// tma_load_4d with a policy for the L2 cache; and only as far as there, which is in order even before the kernel in
// front has written what is read.
__device__ __forceinline__ void tma_load_4d(void* destination, const CUtensorMap& map, MBarrier& barrier, int32_t x,
                                            int32_t y, int32_t z, int32_t w, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;\n" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier.state)), "r"(x), "r"(y), "r"(z), "r"(w), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void tma_prefetch_4d(const CUtensorMap& map, int32_t x, int32_t y, int32_t z, int32_t w,
                                                uint64_t policy) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.4d.L2.global.tile.L2::cache_hint [%0, {%1, %2, %3, %4}], %5;\n" ::"l"(&map),
      "r"(x), "r"(y), "r"(z), "r"(w), "l"(policy)
      : "memory");
}

// Bytes that lie side by side, a multiple of 16 from an address that is one, to shared memory. By one thread.
__device__ __forceinline__ void tma_load_bytes(void* destination, const void* source, MBarrier& barrier,
                                               uint32_t num_bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   shared_address(destination)),
               "l"(source), "r"(num_bytes), "r"(shared_address(&barrier.state))
               : "memory");
}
// With a policy for the L2 cache.
__device__ __forceinline__ void tma_load_bytes(void* destination, const void* source, MBarrier& barrier,
                                               uint32_t num_bytes, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;\n" ::
          "r"(shared_address(destination)),
      "l"(source), "r"(num_bytes), "r"(shared_address(&barrier.state)), "l"(policy)
      : "memory");
}

// And only as far as the L2 cache.
__device__ __forceinline__ void tma_prefetch_bytes(const void* source, uint32_t num_bytes, uint64_t policy) {
  asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;\n" ::"l"(source), "r"(num_bytes),
               "l"(policy)
               : "memory");
}

}  // namespace fastattn
