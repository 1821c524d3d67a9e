// Instantiations of flash_bwd_sm80 for head dims padded to 128.
#include "attention/flash_bwd_sm80.cuh"

namespace fastattn {

template cudaError_t launch_flash_bwd_sm80<__nv_bfloat16, 128, false>(const FlashBwdSm80Params&, cudaStream_t);
template cudaError_t launch_flash_bwd_sm80<__half, 128, false>(const FlashBwdSm80Params&, cudaStream_t);

}  // namespace fastattn
