// The copy engine. A copy may begin at once, so that what its target held is gone, and it may end late.
#pragma once

#include <cuda.h>

#include "arch/cache_policy.cuh"
#include "arch/mbarrier.cuh"

namespace fastattn {

// Any lane, but the same for all.
inline bool elect_lane() {
  const int draw = emulator::this_lane() == 0 ? static_cast<int>(emulator::random_engine() % 32) : 0;
  return emulator::exchange(draw)[0] == emulator::this_lane();
}

inline void tma_prefetch_map(const CUtensorMap&) {}

inline void tma_prefetch_4d(const CUtensorMap&, int32_t, int32_t, int32_t, int32_t, uint64_t) {}

void tma_load_4d_multicast(void* destination, const CUtensorMap& map, MBarrier& barrier, int32_t x, int32_t y,
                           int32_t z, int32_t w, uint16_t cta_mask);

inline void tma_load_4d(void* destination, const CUtensorMap& map, MBarrier& barrier, int32_t x, int32_t y, int32_t z,
                        int32_t w, uint64_t = 0) {
  tma_load_4d_multicast(destination, map, barrier, x, y, z, w, static_cast<uint16_t>(1u << emulator::this_rank()));
}

void tma_load_whole_rows(void* destination, const CUtensorMap& map, MBarrier& barrier, int32_t row, int32_t z,
                         int32_t w);

void tma_load_bytes(void* destination, const void* source, MBarrier& barrier, uint32_t num_bytes, uint64_t = 0);

void tma_prefetch_bytes(const void* source, uint32_t num_bytes, uint64_t);

}  // namespace fastattn
