// What flash_bwd_sm90.cu puts together: the launcher template of the main kernel, defined in flash_bwd_sm90_launch.cuh
// and instantiated in flash_bwd_sm90_hd*.cu, so that they compile in parallel.
#pragma once

#include "attention/flash_bwd_sm90.h"

namespace fastattn {

template <typename T, int HEAD_DIM>
cudaError_t launch_flash_bwd_sm90(const FlashBwdSm90Params& params, cudaStream_t stream);

}  // namespace fastattn
