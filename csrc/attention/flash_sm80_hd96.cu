// Instantiations of flash_sm80 for head dims padded to 96.
#include "attention/flash_sm80.cuh"

namespace fastattn {

#define INSTANTIATE(T, LOADER, MASK) \
  template cudaError_t launch_flash_sm80<T, 96, LOADER<T>, MASK>(const FlashSm80Params&, cudaStream_t);

INSTANTIATE(__nv_bfloat16, ContiguousKv, AttentionMask)
INSTANTIATE(__nv_bfloat16, PagedKv, AttentionMask)
INSTANTIATE(__nv_bfloat16, PagedKv, TreeMask)
INSTANTIATE(__half, ContiguousKv, AttentionMask)
INSTANTIATE(__half, PagedKv, AttentionMask)
INSTANTIATE(__half, PagedKv, TreeMask)

}  // namespace fastattn
