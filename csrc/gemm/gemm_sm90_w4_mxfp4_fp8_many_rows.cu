#include "arch/dispatch.h"
#include "gemm/gemm_sm90_w4_many_rows.cuh"

namespace fastattn {

cudaError_t gemm_mxfp4_fp8_sm90_many_rows(const GemmSm90W4Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    using T = decltype(type);
    return params.fast_accum ? run_gemm_sm90_w4_many_rows<GemmSm90W4TilesA8<T, 32, true>>(params, stream)
                             : run_gemm_sm90_w4_many_rows<GemmSm90W4TilesA8<T, 32, false>>(params, stream);
  });
}

}  // namespace fastattn
