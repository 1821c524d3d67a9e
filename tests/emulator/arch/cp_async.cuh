// cp.async: what the target held is gone when a copy is asked for, and what it brings is there when it is waited for.
#pragma once

#include "arch/cache_policy.cuh"
#include "arch/mma_sm80.cuh"

namespace emulator {

struct AsyncCopy {
  void* destination;
  const void* source;
  size_t num_bytes;
  bool valid;

  void complete() const {
    if (valid) {
      std::memcpy(destination, source, num_bytes);
    } else {
      std::memset(destination, 0, num_bytes);
    }
  }
};

inline WorkInGroups<AsyncCopy> async_copies("copies");

inline void copy(void* destination, const void* source, size_t num_bytes, bool valid) {
  if (fastattn::shared_address(destination) % num_bytes != 0 || reinterpret_cast<uintptr_t>(source) % num_bytes != 0) {
    fail("cp.async from or to an address that is not a multiple of " + std::to_string(num_bytes));
  }
  std::memset(destination, 0xff, num_bytes);
  async_copies.add({destination, source, num_bytes, valid});
}

}  // namespace emulator

namespace fastattn {

inline void cp_async_16(void* destination, const void* source, bool valid, uint64_t = 0) {
  emulator::copy(destination, source, 16, valid);
}
inline void cp_async_16(uint32_t destination, const void* source, bool valid) {
  cp_async_16(emulator::smem_of(emulator::this_rank()) + destination, source, valid);
}
inline void cp_async_4(void* destination, const void* source, bool valid) {
  emulator::copy(destination, source, 4, valid);
}

inline void cp_async_commit() { emulator::async_copies.commit(); }

template <int PENDING>
void cp_async_wait() {
  auto& groups = emulator::async_copies.of_this_thread().groups;
  for (; groups.size() > PENDING; groups.pop_front()) {
    for (const emulator::AsyncCopy& copy : groups.front()) copy.complete();
  }
}

}  // namespace fastattn
