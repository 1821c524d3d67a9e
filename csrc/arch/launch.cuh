// Starting a kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastattn {

template <typename... Params>
cudaError_t allow_shared_memory(void (*kernel)(Params...), int smem_bytes) {
  constexpr int kUsual = 48 * 1024;
  if (smem_bytes <= kUsual) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes);
}

// On a one-dimensional grid, with so much dynamic shared memory. The only place with a syntax that nvcc alone knows:
// tests/emulator has its own.
template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), int64_t num_ctas, int num_threads, int smem_bytes,
                          cudaStream_t stream, const Args&... args) {
  const cudaError_t error = allow_shared_memory(kernel, smem_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(num_ctas), num_threads, smem_bytes, stream>>>(args...);
  return cudaGetLastError();
}

// The same before the kernel in front has ended (arch/grid_dependency.cuh), with CTAs in clusters of so many; 0 or 1:
// none, since a CTA on its own begins 0.3 us sooner than a cluster of one.
template <typename... Params, typename... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), int64_t num_ctas, int cluster_size, int num_threads,
                            int smem_bytes, cudaStream_t stream, const Args&... args) {
  const cudaError_t error = allow_shared_memory(kernel, smem_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster_size);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_ctas));
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster_size > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// With all CTAs at the same time, which wait for each other; an error where the device has no room for them.
template <typename... Params, typename... Args>
cudaError_t launch_together(void (*kernel)(Params...), int64_t num_ctas, int num_threads, int smem_bytes,
                            cudaStream_t stream, const Args&... args) {
  const cudaError_t error = allow_shared_memory(kernel, smem_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_ctas));
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Whether kernels of the current device can begin so.
inline bool has_grid_dependencies() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// Where they cannot, it begins when the kernel in front has ended.
template <typename... Params, typename... Args>
cudaError_t launch_kernel_behind(void (*kernel)(Params...), int64_t num_ctas, int num_threads, int smem_bytes,
                                 cudaStream_t stream, const Args&... args) {
  return has_grid_dependencies() ? launch_clusters(kernel, num_ctas, 0, num_threads, smem_bytes, stream, args...)
                                 : launch_kernel(kernel, num_ctas, num_threads, smem_bytes, stream, args...);
}

}  // namespace fastattn
