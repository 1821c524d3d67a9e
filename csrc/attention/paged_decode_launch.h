// The launcher template of paged_decode: declared here for the dispatch table, defined in paged_decode.cuh,
// instantiated in paged_decode_hd*.cu, so that they compile in parallel.
#pragma once

#include "attention/paged_decode.h"

namespace fastattn {

struct AttentionMask;
struct TreeMask;

// T: of q and out, uint16_t with K and V of 8 bits: bf16 or fp16, as the call says. KV: of k and v.
template <typename T, typename KV, int HEAD_DIM, typename Mask, bool BESIDE = false>
cudaError_t launch_paged_decode(const PagedDecodeParams& params, cudaStream_t stream);

}  // namespace fastattn
