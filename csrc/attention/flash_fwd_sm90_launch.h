// The launcher template of flash_fwd_sm90: declared here for the dispatch table, defined in flash_fwd_sm90_launch.cuh,
// instantiated in flash_fwd_sm90_hd*.cu, so that they compile in parallel.
#pragma once

#include "attention/flash_fwd_sm90.h"

namespace fastattn {

template <typename T, int HEAD_DIM, int V_HEAD_DIM, int NUM_CONSUMERS, int BLOCK_N, bool EXTRAS, bool WIDENS = false,
          bool PACKS = false>
cudaError_t launch_flash_fwd_sm90(const FlashFwdSm90Params& params, cudaStream_t stream);

}  // namespace fastattn
