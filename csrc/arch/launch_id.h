// What tells a launch from all others, for marks in memory that nobody cleared.
#pragma once

#include <atomic>
#include <cstdint>
#include <random>

namespace fastattn {

// One that no other launch has, and that memory holds by a chance of 2^-64: a counter whose values are far from each
// other, from a random begin on.
inline uint64_t new_launch_id() {
  static std::atomic<uint64_t> counter = [] {
    std::random_device random;
    return static_cast<uint64_t>(random()) << 32 | random();
  }();
  const uint64_t id = counter.fetch_add(0x9e3779b97f4a7c15u, std::memory_order_relaxed);
  return id != 0 ? id : new_launch_id();
}

}  // namespace fastattn
