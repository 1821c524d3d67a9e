// Starting a kernel: its CTAs run before this returns, one after the other, and those of a cluster together.
#pragma once

#include "device.h"

namespace fastattn {

template <typename... Params, typename... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), int64_t num_ctas, int cluster_size, int num_threads,
                            int num_smem_bytes, cudaStream_t, const Args&... args) {
  if (num_smem_bytes > emulator::kMaxSmemBytes) emulator::fail("too much shared memory");
  if (cluster_size > emulator::kMaxClusterSize) emulator::fail("a cluster of more CTAs than all GPUs take");
  if (num_ctas % cluster_size != 0) emulator::fail("a cluster that is not whole");
  emulator::Cta& cta = emulator::cta;
  cta.num_blocks = num_ctas;
  for (cta.block_idx = 0; cta.block_idx < num_ctas; cta.block_idx += cluster_size) {
    std::memset(smem_bytes, 0xff, cluster_size * emulator::kMaxSmemBytes);
    const bool is_last = cta.block_idx + cluster_size == num_ctas;
    cta.num_tickets = is_last ? INT32_MAX : static_cast<int>(emulator::random_engine() % 6);
    emulator::run_cluster(num_threads, cluster_size, [&] { kernel(args...); });
    for (int rank = 0; rank < cluster_size; ++rank) {
      for (int warp = 0; warp < 32; ++warp) {
        int (&waits)[32] = emulator::num_product_waits[rank];
        if (waits[warp] != waits[warp / 4 * 4])
          emulator::fail("warps of a group wait for products at different places");
        if (warp % 4 == 3) std::fill(waits + warp - 3, waits + warp + 1, 0);
      }
      for (int i = num_smem_bytes; i < emulator::kMaxSmemBytes; ++i) {
        if (emulator::smem_of(rank)[i] != 0xff) emulator::fail("a write behind the end of shared memory");
      }
    }
  }
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), int64_t num_ctas, int num_threads, int num_smem_bytes,
                          cudaStream_t stream, const Args&... args) {
  return launch_clusters(kernel, num_ctas, 1, num_threads, num_smem_bytes, stream, args...);
}

template <typename... Params, typename... Args>
cudaError_t launch_kernel_behind(void (*kernel)(Params...), int64_t num_ctas, int num_threads, int num_smem_bytes,
                                 cudaStream_t stream, const Args&... args) {
  return launch_kernel(kernel, num_ctas, num_threads, num_smem_bytes, stream, args...);
}

}  // namespace fastattn
