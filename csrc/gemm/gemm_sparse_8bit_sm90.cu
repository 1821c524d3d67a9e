// Products with 2:4 sparse weights in int8 and e4m3.
#include "arch/dispatch.h"
#include "gemm/gemm_sm90_sparse_24.cuh"

namespace fastattn {

cudaError_t gemm_sparse_int8_sm90(const GemmSm90SparseParams& params, cudaStream_t stream) {
  return dispatch_half(params.dtype,
                       [&](auto type) { return run_gemm_sm90_sparse<GemmSm90Int8<decltype(type)>>(params, stream); });
}

cudaError_t gemm_sparse_fp8_sm90(const GemmSm90SparseParams& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    using InTwoLevels = GemmSm90Fp8<decltype(type), false>;
    return params.fast_accum ? run_gemm_sm90_sparse<GemmSm90Fp8<decltype(type), true>, InTwoLevels>(params, stream)
                             : run_gemm_sm90_sparse<InTwoLevels>(params, stream);
  });
}

}  // namespace fastattn
