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

// The same with CTAs in clusters of so many, and begun before the kernel in front has ended (arch/grid_dependency.cuh).
template <typename... Params, typename... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), int64_t num_ctas, int cluster_size, int num_threads,
                            int smem_bytes, cudaStream_t stream, const Args&... args) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster_size);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_ctas));
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace fastattn
