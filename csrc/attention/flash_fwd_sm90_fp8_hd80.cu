#include "attention/flash_fwd_sm90_launch.cuh"

namespace fastattn {

template cudaError_t launch_flash_fwd_sm90<__nv_fp8_e4m3, 96, 80, 2, 192, false>(const FlashFwdSm90Params&,
                                                                                 cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__nv_fp8_e4m3, 96, 80, 3, 128, false>(const FlashFwdSm90Params&,
                                                                                 cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__nv_fp8_e4m3, 96, 80, 2, 192, true>(const FlashFwdSm90Params&,
                                                                                cudaStream_t);

}  // namespace fastattn
