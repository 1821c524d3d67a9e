// Clusters: CTAs that run at the same time on neighbouring SMs and see each other's shared memory.
#pragma once

#include <cstdint>

#include "arch/shared_memory.cuh"

namespace fastattn {

// This CTA's place in its cluster, and how many there are. On GPUs without clusters each CTA is one of its own.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
#endif
  return size;
}

// Waits for all threads of the cluster: that they have made their barriers (fence_barrier_init), or no longer use this
// CTA's memory, before it ends. What they wrote need not be visible, or even have arrived.
__device__ __forceinline__ void cluster_meet() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.aligned;\n" ::
          : "memory");
#else
  __syncthreads();
#endif
}

// cluster_meet in two parts: nobody waits in the first one.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.aligned;\n" ::: "memory");
#else
  __syncthreads();
#endif
}

// cluster_meet that also sees what they wrote.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
#else
  __syncthreads();
#endif
}

// Where the CTA of that rank has what this one has at `pointer`.
__device__ __forceinline__ uint32_t cluster_address(const void* pointer, uint32_t rank) {
  uint32_t address = shared_address(pointer);
#if __CUDA_ARCH__ >= 900
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(address) : "r"(address), "r"(rank));
#endif
  return address;
}

#if __CUDA_ARCH__ >= 900
#define FASTATTN_LOAD_CLUSTER "ld.shared::cluster"
#else
#define FASTATTN_LOAD_CLUSTER "ld.shared"
#endif

// V is aligned to its size, of 8 or 16 bytes.
template <typename V>
__device__ __forceinline__ V load_cluster(uint32_t address) {
  static_assert(sizeof(V) == 8 || sizeof(V) == 16);
  V value;
  uint64_t words[sizeof(V) / 8];
  if constexpr (sizeof(V) == 8) {
    asm volatile(FASTATTN_LOAD_CLUSTER ".u64 %0, [%1];\n" : "=l"(words[0]) : "r"(address) : "memory");
  } else {
    asm volatile(FASTATTN_LOAD_CLUSTER ".v2.u64 {%0, %1}, [%2];\n"
                 : "=l"(words[0]), "=l"(words[1])
                 : "r"(address)
                 : "memory");
  }
  __builtin_memcpy(&value, words, sizeof(V));
  return value;
}
#undef FASTATTN_LOAD_CLUSTER

}  // namespace fastattn
