// cp.async: what the target held is gone when a copy is asked for, and what it brings is there when it is waited for.
#pragma once

#include "arch/mma_sm80.cuh"

namespace emulator {

struct AsyncCopy {
  void* destination;
  const void* source;
  bool valid;

  void complete() const {
    if (valid) {
      std::memcpy(destination, source, 16);
    } else {
      std::memset(destination, 0, 16);
    }
  }
};

inline WorkInGroups<AsyncCopy> async_copies("copies");

}  // namespace emulator

namespace fastattn {

inline void cp_async_16(void* destination, const void* source, bool valid) {
  if (shared_address(destination) % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    emulator::fail("cp.async from or to an address that is not a multiple of 16");
  }
  std::memset(destination, 0xff, 16);
  emulator::async_copies.add({destination, source, valid});
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
