// Starting a kernel: its CTAs run before this returns, one after the other.
#pragma once

#include "device.h"

namespace fastattn {

template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), int64_t num_ctas, int num_threads, int num_smem_bytes,
                          cudaStream_t, const Args&... args) {
  if (num_smem_bytes > emulator::kMaxSmemBytes) emulator::fail("too much shared memory");
  emulator::cta.num_blocks = num_ctas;
  for (emulator::cta.block_idx = 0; emulator::cta.block_idx < num_ctas; ++emulator::cta.block_idx) {
    std::memset(smem_bytes, 0xff, sizeof(smem_bytes));
    const bool is_last = emulator::cta.block_idx + 1 == num_ctas;
    emulator::cta.num_tickets = is_last ? INT32_MAX : static_cast<int>(emulator::random_engine() % 6);
    emulator::run_cta(num_threads, [&] { kernel(args...); });
    for (int i = num_smem_bytes; i < emulator::kMaxSmemBytes; ++i) {
      if (smem_bytes[i] != 0xff) emulator::fail("a write behind the end of shared memory");
    }
  }
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t launch_kernel_behind(void (*kernel)(Params...), int64_t num_ctas, int num_threads, int num_smem_bytes,
                                 cudaStream_t stream, const Args&... args) {
  return launch_kernel(kernel, num_ctas, num_threads, num_smem_bytes, stream, args...);
}

}  // namespace fastattn
