// The copy engine. A copy may begin at once, so that what its target held is gone, and it may end late.
#pragma once

#include <cuda.h>

#include "arch/cache_policy.cuh"
#include "arch/mbarrier.cuh"
#include "tensor_map.h"

namespace fastattn {

inline void tma_prefetch_map(const CUtensorMap&) {}

inline void tma_prefetch_4d(const CUtensorMap&, int32_t, int32_t, int32_t, int32_t, uint64_t) {}

inline void tma_load_4d_multicast(void* destination, const CUtensorMap& map, MBarrier& barrier, int32_t x, int32_t y,
                                  int32_t z, int32_t w, uint16_t cta_mask) {
  const emulator::TensorMap tensor = emulator::read_tensor_map(map);
  const uint32_t target = shared_address(destination);
  const int row_bytes = tensor.box[0] * tensor.element_bytes, num_rows = tensor.box[1] * tensor.box[2];
  const int num_bytes = row_bytes * num_rows;
  // With a swizzle, fewer rows than it repeats after would begin in its middle.
  const bool swizzled = row_bytes == 128 || row_bytes == 64;
  if (target % (swizzled ? 8 * row_bytes : 128) != 0)
    emulator::fail("a box at byte " + std::to_string(target) + ", not aligned");
  for (int rank = 0; rank < 16; ++rank) {
    if ((cta_mask >> rank & 1) == 0) continue;
    if (rank >= emulator::cta.cluster_size) emulator::fail("a copy to a CTA that is not in the cluster");
    unsigned char* const smem = emulator::smem_of(rank);
    std::memset(smem + target, 0xff, num_bytes);
    emulator::cta.pending.push_back([=, &its_barrier = barrier.of_cta(rank)] {
      emulator::require_running(rank);
      for (int row = 0; row < num_rows; ++row) {
        const int y_row = y + row % tensor.box[1], z_row = z + row / tensor.box[1];
        for (int begin = 0; begin < row_bytes; begin += 16) {  // what a swizzle keeps together
          unsigned char chunk[16];
          for (int i = 0; i < 16; i += tensor.element_bytes) {
            tensor.read(x + (begin + i) / tensor.element_bytes, y_row, z_row, w, chunk + i);
          }
          std::memcpy(smem + emulator::swizzle(target + row * row_bytes + begin, row_bytes), chunk, 16);
        }
      }
      its_barrier.complete_bytes(num_bytes);
    });
  }
}

inline void tma_load_4d(void* destination, const CUtensorMap& map, MBarrier& barrier, int32_t x, int32_t y, int32_t z,
                        int32_t w, uint64_t = 0) {
  tma_load_4d_multicast(destination, map, barrier, x, y, z, w, static_cast<uint16_t>(1u << emulator::this_rank()));
}

inline void tma_load_bytes(void* destination, const void* source, MBarrier& barrier, uint32_t num_bytes, uint64_t = 0) {
  const uint32_t target = shared_address(destination);
  if (target % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0 || num_bytes % 16 != 0) {
    emulator::fail("bytes from or to an address that is not a multiple of 16, or not a multiple of 16 of them");
  }
  std::memset(destination, 0xff, num_bytes);
  unsigned char* const smem = emulator::smem_of(emulator::this_rank());
  emulator::cta.pending.push_back([=, &barrier] {
    std::memcpy(smem + target, source, num_bytes);
    barrier.complete_bytes(num_bytes);
  });
}

inline void tma_prefetch_bytes(const void* source, uint32_t num_bytes, uint64_t) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0 || num_bytes % 16 != 0) {
    emulator::fail("bytes from an address that is not a multiple of 16, or not a multiple of 16 of them");
  }
}

}  // namespace fastattn
