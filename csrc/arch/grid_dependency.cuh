// Kernels of a stream that begin before the one in front has ended (programmatic dependent launch): their CTAs take the
// places that become free, set themselves up, and wait. A short kernel lets the one behind begin as soon as its own
// wait is over: the products then bring their weights' first tiles into L2 while it runs. Not sooner, so that they do
// not take bandwidth from the kernel in front of it.
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
