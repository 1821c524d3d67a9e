// Kernels of a stream that begin before the one in front has ended (programmatic dependent launch): their CTAs take the
// places that become free, set themselves up, and wait.
#pragma once

namespace fastattn {

// From here on the kernel behind may begin, once all CTAs have come here.
__device__ __forceinline__ void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Until the kernel in front has ended and its writes can be seen; at once if there is none to wait for.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace fastattn
