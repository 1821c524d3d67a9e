#include "attention/flash_fwd_sm90_launch.cuh"

namespace fastattn {

template cudaError_t launch_flash_fwd_sm90<__nv_bfloat16, 64, 64, 3, 128, false>(const FlashFwdSm90Params&,
                                                                                 cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__half, 64, 64, 3, 128, false>(const FlashFwdSm90Params&, cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__nv_bfloat16, 64, 64, 3, 128, true>(const FlashFwdSm90Params&,
                                                                                cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__half, 64, 64, 3, 128, true>(const FlashFwdSm90Params&, cudaStream_t);

}  // namespace fastattn
