// The copy engine's tiled loads (device side). Maps are made on the host by arch/tensor_map.h.
#pragma once

#include <cuda.h>

#include "arch/mbarrier.cuh"

namespace fastattn {

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
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

// Bytes that lie side by side, a multiple of 16 from an address that is one, to shared memory. By one thread.
__device__ __forceinline__ void tma_load_bytes(void* destination, const void* source, MBarrier& barrier,
                                               uint32_t num_bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   shared_address(destination)),
               "l"(source), "r"(num_bytes), "r"(shared_address(&barrier.state))
               : "memory");
}

}  // namespace fastattn
