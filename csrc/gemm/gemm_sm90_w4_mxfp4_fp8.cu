// e4m3 times MXFP4 weights, which become e4m3.
#include "arch/dispatch.h"
#include "gemm/gemm_sm90_w4.cuh"

namespace fastattn {

cudaError_t gemm_mxfp4_fp8_sm90(const GemmSm90W4Params& params, cudaStream_t stream) {
  if (params.config.many_rows) return gemm_mxfp4_fp8_sm90_many_rows(params, stream);
  return dispatch_half(params.dtype,
                       [&](auto type) { return run_gemm_sm90_w4<GemmSm90W4A8<decltype(type), 32>>(params, stream); });
}

}  // namespace fastattn
