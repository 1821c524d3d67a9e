// Kernels of a stream that begin before the one in front has ended (programmatic dependent launch): their CTAs take the
// places that become free, set themselves up, and wait. A short kernel lets the one behind begin at once: of two
// products with a norm between them, the second's CTAs come where those of the first end, and bring their weights'
// first tiles into L2 while memory would have nothing to do.
//
// So kernels of more than two launches may be there at a time. Each waits, in all of its CTAs, before it reads what
// another has written and before it writes; and what was written while it was there it must not read by
// `ld.global.nc` (`__ldg`): an SM's first-level cache may hold what a kernel beside it has read at that place before.
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
