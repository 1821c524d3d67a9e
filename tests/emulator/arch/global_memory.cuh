// What threads of different CTAs say to each other through device memory.
#pragma once

#include "device.h"

namespace fastattn {

inline uint64_t load_acquire(const uint64_t* address) {
  emulator::poll();
  return *address;
}
inline int32_t load_acquire(const int32_t* address) {
  emulator::poll();
  return *address;
}
inline void add_release(int32_t* address, int32_t value) { *address += value; }
inline void add_to_global(float* address, const float (&values)[4]) {
  for (int i = 0; i < 4; ++i) address[i] += values[i];
}
inline void store_release(uint64_t* address, uint64_t value) { *address = value; }
inline void prefetch_l2(const void*) {}
inline int32_t load_early(const int32_t* address) { return *address; }
inline uint4 load_early(const uint4* address) { return *address; }
inline uint4 load_if(bool wanted, const void* address, uint64_t, bool) {
  return wanted ? *static_cast<const uint4*>(address) : uint4{~0u, ~0u, ~0u, ~0u};
}
inline void clear(uint4& value) { value = {}; }

// Kernels count the tiles that they hand out. CTAs run one after the other, and so that the first does not get all,
// each has a number of tickets, and is then told that others have taken the rest.
inline int32_t count_up(int32_t* address) {
  constexpr int32_t kFarBehindTheEnd = 1 << 29;
  return emulator::cta.num_tickets-- > 0 ? (*address)++ : kFarBehindTheEnd;
}

}  // namespace fastattn
