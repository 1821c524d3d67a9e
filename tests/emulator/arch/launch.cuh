// Starting a kernel: its CTAs run before this returns, one after the other, and those of a cluster together, or of a
// grid whose CTAs wait for each other.
#pragma once

#include "device.h"

namespace fastattn {

template <typename... Params, typename... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), int64_t num_ctas, int cluster_size, int num_threads,
                            int num_smem_bytes, cudaStream_t, const Args&... args) {
  if (cluster_size > emulator::kMaxClusterSize) emulator::fail("a cluster of more CTAs than all GPUs take");
  emulator::run_grid(num_ctas, cluster_size, num_threads, num_smem_bytes, [&] { kernel(args...); });
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), int64_t num_ctas, int num_threads, int num_smem_bytes,
                          cudaStream_t stream, const Args&... args) {
  return launch_clusters(kernel, num_ctas, 1, num_threads, num_smem_bytes, stream, args...);
}

template <typename... Params, typename... Args>
cudaError_t launch_together(void (*kernel)(Params...), int64_t num_ctas, int num_threads, int num_smem_bytes,
                            cudaStream_t, const Args&... args) {
  emulator::run_grid(num_ctas, static_cast<int>(num_ctas), num_threads, num_smem_bytes, [&] { kernel(args...); });
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t launch_kernel_behind(void (*kernel)(Params...), int64_t num_ctas, int num_threads, int num_smem_bytes,
                                 cudaStream_t stream, const Args&... args) {
  return launch_kernel(kernel, num_ctas, num_threads, num_smem_bytes, stream, args...);
}

}  // namespace fastattn
