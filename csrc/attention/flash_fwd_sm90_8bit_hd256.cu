#include "attention/flash_fwd_sm90_launch.cuh"

namespace fastattn {

template cudaError_t launch_flash_fwd_sm90<__nv_bfloat16, 256, 256, 2, 64, false, true>(const FlashFwdSm90Params&,
                                                                                        cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__nv_bfloat16, 256, 256, 2, 64, true, true>(const FlashFwdSm90Params&,
                                                                                       cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__half, 256, 256, 2, 64, false, true>(const FlashFwdSm90Params&,
                                                                                 cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__half, 256, 256, 2, 64, true, true>(const FlashFwdSm90Params&,
                                                                                cudaStream_t);

}  // namespace fastattn
