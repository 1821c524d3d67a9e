// Products with 2:4 sparse weights in bf16 and fp16.
#include "arch/dispatch.h"
#include "gemm/gemm_sm90_sparse_24.cuh"

namespace fastattn {

cudaError_t gemm_sparse_sm90(const GemmSm90SparseParams& params, cudaStream_t stream) {
  return dispatch_half(params.dtype,
                       [&](auto type) { return run_gemm_sm90_sparse<GemmSm90Dense<decltype(type)>>(params, stream); });
}

}  // namespace fastattn
