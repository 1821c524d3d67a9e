#include "arch/dispatch.h"
#include "gemm/gemm_sm90_w4_many_rows.cuh"

namespace fastattn {

cudaError_t gemm_mxfp4_sm90_many_rows(const GemmSm90W4Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    return run_gemm_sm90_w4_many_rows<GemmSm90W4TilesA16<Mxfp4Tiles<decltype(type)>>>(params, stream);
  });
}

}  // namespace fastattn
