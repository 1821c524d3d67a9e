// Clusters: addresses in another CTA's shared memory have its rank above the 24 bits of the address in its own.
#pragma once

#include "arch/shared_memory.cuh"

namespace fastattn {

inline uint32_t cluster_rank() { return static_cast<uint32_t>(emulator::this_rank()); }
inline uint32_t cluster_size() { return static_cast<uint32_t>(emulator::cta.cluster_size); }
inline void cluster_sync() { emulator::sync_cluster(); }
inline void cluster_meet() { emulator::sync_cluster(); }
inline void cluster_arrive() { emulator::arrive_at_cluster(); }
inline void cluster_wait() { emulator::wait_for_cluster(); }

inline uint32_t cluster_address(const void* pointer, uint32_t rank) { return rank << 24 | shared_address(pointer); }

template <typename V>
inline V load_cluster(uint32_t address) {
  const int rank = static_cast<int>(address >> 24);
  emulator::require_running(rank);
  V value;
  std::memcpy(&value, emulator::smem_of(rank) + (address & 0xffffff), sizeof(value));
  return value;
}

}  // namespace fastattn
