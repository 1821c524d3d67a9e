#include "arch/dispatch.h"
#include "gemm/gemm_sm90.cuh"
#include "gemm/gemm_sm90_stores.cuh"

namespace fastattn {

cudaError_t launch_gemm_added_sm90_many_rows(const GemmSm90AddedParams& p, cudaStream_t stream) {
  return dispatch_half(p.dtype, [&](auto type) {
    return launch_gemm_added_sm90_tile<GemmSm90Dense<decltype(type)>, GemmSm90Added>(p, stream);
  });
}

}  // namespace fastattn
