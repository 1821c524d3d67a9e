#include "attention/flash_fwd_sm90_launch.cuh"

namespace fastattn {

template cudaError_t launch_flash_fwd_sm90<__nv_fp8_e4m3, 192, 192, 2, 128, false>(const FlashFwdSm90Params&,
                                                                                   cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__nv_fp8_e4m3, 192, 192, 2, 160, false>(const FlashFwdSm90Params&,
                                                                                   cudaStream_t);
template cudaError_t launch_flash_fwd_sm90<__nv_fp8_e4m3, 192, 192, 2, 128, true>(const FlashFwdSm90Params&,
                                                                                  cudaStream_t);

}  // namespace fastattn
