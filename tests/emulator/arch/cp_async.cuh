// cp.async: what the target held is gone when a copy is asked for, and what it brings is there when it is waited for.
#pragma once

#include "arch/cache_policy.cuh"
#include "arch/mma_sm80.cuh"

namespace emulator {

// Begins a copy, or if it is not valid, of zeros.
void copy(void* destination, const void* source, size_t num_bytes, bool valid);
void commit_copies();
// This thread's, but for the last groups.
void wait_for_copies(size_t num_pending);

}  // namespace emulator

namespace fastattn {

inline void cp_async_16(void* destination, const void* source, bool valid, uint64_t = 0) {
  emulator::copy(destination, source, 16, valid);
}
inline void cp_async_16(uint32_t destination, const void* source, bool valid) {
  cp_async_16(emulator::smem_of(emulator::this_rank()) + destination, source, valid);
}
inline void cp_async_16_if(uint32_t destination, const void* source, uint32_t valid, uint64_t) {
  cp_async_16(destination, source, valid != 0);
}
inline void cp_async_4(void* destination, const void* source, bool valid) {
  emulator::copy(destination, source, 4, valid);
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int PENDING>
void cp_async_wait() {
  emulator::wait_for_copies(PENDING);
}

}  // namespace fastattn
