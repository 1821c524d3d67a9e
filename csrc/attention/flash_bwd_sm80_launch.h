// The launcher template of flash_bwd_sm80: declared here for the dispatch table, defined in flash_bwd_sm80.cuh,
// instantiated in flash_bwd_sm80_hd*.cu, one head dim per file, so that they compile in parallel.
#pragma once

#include "attention/flash_bwd_sm80.h"

namespace fastattn {

template <typename T, int HEAD_DIM, bool LARGE>
cudaError_t launch_flash_bwd_sm80(const FlashBwdSm80Params& params, cudaStream_t stream);

}  // namespace fastattn
