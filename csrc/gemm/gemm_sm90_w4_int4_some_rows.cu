// bf16 or fp16 times INT4 weights in tiles, 9 to 64 rows. See gemm_sm90_w4_some_rows.cuh.
#include "arch/dispatch.h"
#include "gemm/gemm_sm90_w4_some_rows.cuh"

namespace fastattn {

cudaError_t gemm_int4_some_rows_sm90(const GemmSm90W4Params& params, const GemmSm90W4SomeRowsConfig& config,
                                     cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    return run_gemm_sm90_w4_some_rows<Int4Tile<decltype(type)>>(params, config, stream);
  });
}

}  // namespace fastattn
