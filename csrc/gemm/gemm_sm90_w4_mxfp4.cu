// bf16 or fp16 times MXFP4 weights: E2M1, a power of two a group of 32. See gemm_sm90_w4.cuh.
#include "arch/dispatch.h"
#include "gemm/gemm_sm90_w4.cuh"

namespace fastattn {

cudaError_t gemm_mxfp4_sm90(const GemmSm90W4Params& params, cudaStream_t stream) {
  if (params.config.many_rows) return gemm_mxfp4_sm90_many_rows(params, stream);
  return dispatch_half(params.dtype, [&](auto type) {
    return run_gemm_sm90_w4<GemmSm90W4A16<Mxfp4Sm90<decltype(type)>>>(params, stream);
  });
}

}  // namespace fastattn
