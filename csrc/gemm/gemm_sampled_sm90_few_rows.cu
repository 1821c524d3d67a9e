#include "arch/dispatch.h"
#include "gemm/gemm_sm90_few_rows.cuh"
#include "gemm/gemm_sm90_stores.cuh"

namespace fastattn {

cudaError_t gemm_sampled_sm90(const GemmSm90SampledParams& p, cudaStream_t stream) {
  return dispatch_half(p.dtype, [&](auto type) {
    return launch_gemm_sm90_few_rows_tile<GemmSm90Dense<decltype(type)>, GemmSm90Sampled, kGemmSm90MostSampledRows>(
        p, stream);
  });
}

}  // namespace fastattn
