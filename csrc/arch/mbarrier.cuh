// Transaction barriers in shared memory: what a TMA copy and its readers wait for each other with.
//
// A barrier has a phase that flips when all expected arrivals, and all announced bytes, have come.
// `wait(parity)` returns once the phase of that parity is over; a fresh barrier is in phase 0, so
// that wait(1) passes at once.
#pragma once

#include <cstdint>

#include "arch/cluster.cuh"
#include "arch/ring_position.cuh"
#include "arch/shared_memory.cuh"

namespace fastattn {

struct MBarrier {
  uint64_t state;

  __device__ __forceinline__ void init(uint32_t num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(&state)), "r"(num_arrivals));
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(&state)) : "memory");
  }

  // At the barrier of the same place in another CTA of the cluster, or in this one. Says that reads are over; what was
  // written it does not make visible to other CTAs, which would take a fence for the whole GPU.
  __device__ __forceinline__ void arrive_at_cta(uint32_t rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(cluster_address(&state, rank)) : "memory");
  }

  // Writes to where another CTA of the cluster, or this one, has `target`, and its barrier of the same place counts the
  // bytes. Whoever waits there sees them, without a fence, and nobody waits here. V is of 8 or 16 bytes.
  template <typename V>
  __device__ __forceinline__ void store_at_cta(uint32_t rank, V* target, const V& value) {
    static_assert(sizeof(V) == 8 || sizeof(V) == 16);
    uint32_t words[4];
    __builtin_memcpy(words, &value, sizeof(V));
    const uint32_t address = cluster_address(target, rank), barrier = cluster_address(&state, rank);
    if constexpr (sizeof(V) == 8) {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];\n" ::"r"(address),
          "r"(words[0]), "r"(words[1]), "r"(barrier)
          : "memory");
    } else {
      asm volatile(
          "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];\n" ::"r"(address),
          "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(barrier)
          : "memory");
    }
  }

  // One arrival, and so many bytes that copies will still bring.
  __device__ __forceinline__ void arrive_expect_bytes(uint32_t num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(&state)),
                 "r"(num_bytes)
                 : "memory");
  }

  __device__ __forceinline__ bool try_wait(uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(&state)), "r"(parity)
        : "memory");
    return done != 0;
  }

  __device__ __forceinline__ void wait(uint32_t parity) {
    while (!try_wait(parity)) {
    }
  }
};

// Makes the initialization of barriers visible to the copy engine; once, before the CTA's barrier.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

// Makes this thread's writes to shared memory visible to TMA and wgmma.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Waits for so many threads of the CTA at a barrier of the SM (1 to 15; 0 is __syncthreads').
__device__ __forceinline__ void named_barrier_sync(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(barrier), "r"(num_threads) : "memory");
}

// Counts for the others without waiting for them.
__device__ __forceinline__ void named_barrier_arrive(int barrier, int num_threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(barrier), "r"(num_threads) : "memory");
}

// A vote of the 128 threads of a warp group, by way of a barrier of the SM (1 to 15; 0 is __syncthreads').
__device__ __forceinline__ bool any_of_group(int barrier, bool vote) {
  uint32_t any;
  asm volatile(
      "{\n"
      ".reg .pred vote, any;\n"
      "setp.ne.u32 vote, %1, 0;\n"
      "barrier.cta.red.or.pred any, %2, 128, vote;\n"
      "selp.u32 %0, 1, 0, any;\n"
      "}\n"
      : "=r"(any)
      : "r"(static_cast<uint32_t>(vote)), "r"(barrier)
      : "memory");
  return any != 0;
}

}  // namespace fastattn
