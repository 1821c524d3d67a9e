// Instantiations of flash_sm80 for head dims padded to 128.
#include "attention/flash_sm80.cuh"

namespace fastattn {

#define INSTANTIATE(T, LOADER) \
  template cudaError_t launch_flash_sm80<T, 128, LOADER<T>>(const FlashSm80Params&, cudaStream_t);

INSTANTIATE(__nv_bfloat16, ContiguousKv)
INSTANTIATE(__nv_bfloat16, PagedKv)
INSTANTIATE(__half, ContiguousKv)
INSTANTIATE(__half, PagedKv)

}  // namespace fastattn
