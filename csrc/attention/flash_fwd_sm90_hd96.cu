#include "attention/flash_fwd_sm90_launch.cuh"

namespace fastattn {

template cudaError_t launch_flash_fwd_sm90<__nv_bfloat16, 96, 96, 2, 128, false>(const FlashFwdSm90Params&,
                                                                                 cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__half, 96, 96, 2, 128, false>(const FlashFwdSm90Params&, cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__nv_bfloat16, 96, 96, 3, 96, false>(const FlashFwdSm90Params&,
                                                                                cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__half, 96, 96, 3, 96, false>(const FlashFwdSm90Params&, cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__nv_bfloat16, 96, 96, 3, 96, true>(const FlashFwdSm90Params&, cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__half, 96, 96, 3, 96, true>(const FlashFwdSm90Params&, cudaStream_t);

}  // namespace fastattn
