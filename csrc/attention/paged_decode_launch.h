// The launcher template of paged_decode: declared here for the dispatch table, defined in paged_decode.cuh,
// instantiated in paged_decode_hd*.cu, so that they compile in parallel.
#pragma once

#include "attention/paged_decode.h"

namespace fastattn {

template <typename T, int HEAD_DIM>
cudaError_t launch_paged_decode(const PagedDecodeParams& params, cudaStream_t stream);

}  // namespace fastattn
