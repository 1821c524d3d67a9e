// Transaction barriers. One that is never initialized, or gets more arrivals than it expects, is an error.
#pragma once

#include "arch/cluster.cuh"
#include "arch/ring_position.cuh"
#include "arch/shared_memory.cuh"

namespace fastattn {

struct MBarrier {
  int32_t num_bytes_expected;
  int16_t num_missing;  // arrivals
  uint8_t num_arrivals;
  uint8_t phase;

  void init(uint32_t num) {
    num_bytes_expected = 0;
    num_missing = static_cast<int16_t>(num);
    num_arrivals = static_cast<uint8_t>(num);
    phase = 0;
  }

  void arrive() { arrive_expect_bytes(0); }
  void arrive_at_cta(uint32_t rank) {
    emulator::require_running(static_cast<int>(rank));
    of_cta(static_cast<int>(rank)).arrive();
  }
  template <typename V>
  void store_at_cta(uint32_t rank, V* target, const V& value) {
    const int to = static_cast<int>(rank);
    MBarrier& barrier = of_cta(to);
    void* const address = emulator::smem_of(to) + shared_address(target);
    emulator::cta.pending.push_back([=, &barrier] {
      emulator::require_running(to);
      std::memcpy(address, &value, sizeof(V));
      barrier.complete_bytes(sizeof(V));
    });
  }
  void arrive_expect_bytes(uint32_t num_bytes) {
    num_bytes_expected += static_cast<int32_t>(num_bytes);
    if (--num_missing < 0) emulator::fail("an arrival too many: " + text());
    end_phase();
  }
  void complete_bytes(uint32_t num_bytes) {
    num_bytes_expected -= static_cast<int32_t>(num_bytes);
    end_phase();
  }

  void wait(uint32_t parity) {
    struct PhaseIsOver final : emulator::Condition {
      const MBarrier& barrier;
      uint32_t parity;
      PhaseIsOver(const MBarrier& b, uint32_t p) : barrier(b), parity(p) {}
      bool holds() const override { return barrier.phase != parity; }
      std::string text() const override { return barrier.text() + ", its phase " + std::to_string(parity); }
    };
    if (phase > 1) emulator::fail("a wait at a barrier that was not initialized: " + text());
    emulator::wait(PhaseIsOver(*this, parity));
  }

  // The barrier of the same place.
  MBarrier& of_cta(int rank) { return *reinterpret_cast<MBarrier*>(emulator::smem_of(rank) + shared_address(this)); }

  std::string text() const {
    const int64_t address = reinterpret_cast<const unsigned char*>(this) - smem_bytes;
    return "the barrier at byte " + std::to_string(address % emulator::kMaxSmemBytes) + " (" +
           std::to_string(num_missing) + " of " + std::to_string(num_arrivals) + " arrivals and " +
           std::to_string(num_bytes_expected) + " bytes missing)";
  }

 private:
  void end_phase() {
    if (num_missing > 0 || num_bytes_expected != 0) return;
    phase ^= 1;
    num_missing = num_arrivals;
  }
};
static_assert(sizeof(MBarrier) == 8);

inline void fence_barrier_init() {}
inline void fence_proxy_async() {}

inline void named_barrier_sync(int barrier, int num_threads) { emulator::sync_at_barrier(barrier, num_threads); }
inline void named_barrier_arrive(int barrier, int num_threads) { emulator::arrive_at_barrier(barrier, num_threads); }
inline bool any_of_group(int barrier, bool vote) { return emulator::sync_at_barrier(barrier, 128, vote); }

}  // namespace fastattn
