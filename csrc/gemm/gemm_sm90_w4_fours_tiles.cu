// bf16 or fp16 times NVFP4 or MXFP4 weights in tiles in order 8, few rows. See gemm_sm90_w4_tiles.cuh.
#include "arch/dispatch.h"
#include "gemm/gemm_sm90_w4_tiles.cuh"

namespace fastattn {

cudaError_t gemm_nvfp4_tiles_of_fours_sm90(const GemmSm90W4Params& params, const GemmSm90W4TilesConfig& config,
                                           cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    return run_gemm_sm90_w4_tiles<Fp4TileOfFours<decltype(type), 16>>(params, config, stream);
  });
}

cudaError_t gemm_mxfp4_tiles_of_fours_sm90(const GemmSm90W4Params& params, const GemmSm90W4TilesConfig& config,
                                           cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto type) {
    return run_gemm_sm90_w4_tiles<Fp4TileOfFours<decltype(type), 32>>(params, config, stream);
  });
}

}  // namespace fastattn
