// Transaction barriers. One that is never initialized, or gets more arrivals than it expects, is an error.
#pragma once

#include "arch/cluster.cuh"
#include "arch/ring_position.cuh"
#include "arch/shared_memory.cuh"

namespace fastattn {

struct MBarrier {
  int32_t num_bytes_expected;
  int16_t num_missing;  // arrivals
  uint16_t num_arrivals : 14;
  uint16_t phase : 2;  // above 1: never initialized

  void init(uint32_t num) {
    num_bytes_expected = 0;
    num_missing = static_cast<int16_t>(num);
    num_arrivals = static_cast<uint16_t>(num & 0x3fff);
    if (num_arrivals != num) emulator::fail("a barrier of " + std::to_string(num) + " arrivals");
    phase = 0;
  }

  void arrive() { arrive_expect_bytes(0); }
  void arrive_at_cta(uint32_t rank);
  template <typename V>
  void store_at_cta(uint32_t rank, V* target, const V& value) {
    store_bytes_at_cta(static_cast<int>(rank), target, &value, sizeof(V));
  }
  void arrive_expect_bytes(uint32_t num_bytes);
  void complete_bytes(uint32_t num_bytes);
  void wait(uint32_t parity);

  // The barrier of the same place.
  MBarrier& of_cta(int rank) { return *reinterpret_cast<MBarrier*>(emulator::smem_of(rank) + shared_address(this)); }

  std::string text() const;

 private:
  void store_bytes_at_cta(int rank, void* target, const void* value, size_t num_bytes);
  void end_phase();
};
static_assert(sizeof(MBarrier) == 8);

inline void fence_barrier_init() {}
inline void fence_proxy_async() {}

inline void named_barrier_sync(int barrier, int num_threads) { emulator::sync_at_barrier(barrier, num_threads); }
inline void named_barrier_arrive(int barrier, int num_threads) { emulator::arrive_at_barrier(barrier, num_threads); }
inline bool any_of_group(int barrier, bool vote) { return emulator::sync_at_barrier(barrier, 128, vote); }

}  // namespace fastattn
