// Starting a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastattn {

// On a one-dimensional grid, with so much dynamic shared memory. The only place with a syntax that nvcc alone knows:
// tests/emulator has its own.
template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), int64_t num_ctas, int num_threads, int smem_bytes,
                          cudaStream_t stream, const Args&... args) {
  constexpr int kUsual = 48 * 1024;
  if (smem_bytes > kUsual) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(num_ctas), num_threads, smem_bytes, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace fastattn
