#include "attention/flash_bwd_sm90_launch.cuh"

namespace fastattn {

template cudaError_t launch_flash_bwd_sm90<__nv_bfloat16, 96>(const FlashBwdSm90Params&, cudaStream_t);
template cudaError_t launch_flash_bwd_sm90<__half, 96>(const FlashBwdSm90Params&, cudaStream_t);

}  // namespace fastattn
