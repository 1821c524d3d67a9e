// e4m3 times MXFP4 weights, which become e4m3.
#include "arch/dispatch.h"
#include "gemm/gemm_sm90_w4.cuh"
#include "gemm/gemm_sm90_w4_many_rows.cuh"

namespace fastattn {

cudaError_t gemm_mxfp4_fp8_sm90(const GemmSm90W4Params& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    using T = decltype(type);
    using Fast = GemmSm90W4A8<T, 32, true>;
    if (!params.config.many_rows) return run_gemm_sm90_w4<Fast>(params, stream);
    return params.fast_accum ? run_gemm_sm90_w4_many_rows<Fast>(params, stream)
                             : run_gemm_sm90_w4_many_rows<GemmSm90W4A8<T, 32, false>>(params, stream);
  });
}

}  // namespace fastattn
