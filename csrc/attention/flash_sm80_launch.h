// The launcher template of flash_sm80: declared here for the dispatch table, defined in
// flash_sm80.cuh, instantiated in flash_sm80_hd*.cu, one head dim per file, so that they compile in
// parallel.
#pragma once

#include "attention/flash_sm80.h"

namespace fastattn {

template <typename T>
struct ContiguousKv;
template <typename T>
struct PagedKv;

struct AttentionMask;
struct TreeMask;

template <typename T, int HEAD_DIM, typename KvLoader, typename Mask>
cudaError_t launch_flash_sm80(const FlashSm80Params& params, cudaStream_t stream);

}  // namespace fastattn
