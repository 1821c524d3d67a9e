// out = x weight^T + bias for Hopper with few rows of x, or up to 64, and a weight of 4 bits in tiles
// (fastattn/reference/w4_tiles.py). Each format has a .cu for either.
#pragma once

#include "gemm/gemm_sm90_w4.h"
#include "gemm/gemm_sm90_w4_some_rows_config.h"
#include "gemm/gemm_sm90_w4_tiles_config.h"

namespace fastattn {

// Each enqueues the kernel, of params with tiles in order 16 and config from gemm_sm90_w4_tiles_config, for n a
// multiple of 16. params.config is not looked at. cudaErrorInvalidValue if no instantiation fits.
cudaError_t gemm_nvfp4_tiles_sm90(const GemmSm90W4Params& params, const GemmSm90W4TilesConfig& config,
                                  cudaStream_t stream);
cudaError_t gemm_mxfp4_tiles_sm90(const GemmSm90W4Params& params, const GemmSm90W4TilesConfig& config,
                                  cudaStream_t stream);
cudaError_t gemm_int4_tiles_sm90(const GemmSm90W4Params& params, const GemmSm90W4TilesConfig& config,
                                 cudaStream_t stream);

// The same of tiles in order 8, of FP4.
cudaError_t gemm_nvfp4_tiles_of_fours_sm90(const GemmSm90W4Params& params, const GemmSm90W4TilesConfig& config,
                                           cudaStream_t stream);
cudaError_t gemm_mxfp4_tiles_of_fours_sm90(const GemmSm90W4Params& params, const GemmSm90W4TilesConfig& config,
                                           cudaStream_t stream);

// Up to 64 rows, tiles in order 16.
cudaError_t gemm_nvfp4_some_rows_sm90(const GemmSm90W4Params& params, const GemmSm90W4SomeRowsConfig& config,
                                      cudaStream_t stream);
cudaError_t gemm_mxfp4_some_rows_sm90(const GemmSm90W4Params& params, const GemmSm90W4SomeRowsConfig& config,
                                      cudaStream_t stream);
cudaError_t gemm_int4_some_rows_sm90(const GemmSm90W4Params& params, const GemmSm90W4SomeRowsConfig& config,
                                     cudaStream_t stream);

// The former with x in e4m3 and tiles in order 8. Sums have all the bits of fp32.
cudaError_t gemm_nvfp4_fp8_tiles_sm90(const GemmSm90W4Params& params, const GemmSm90W4TilesConfig& config,
                                      cudaStream_t stream);
cudaError_t gemm_mxfp4_fp8_tiles_sm90(const GemmSm90W4Params& params, const GemmSm90W4TilesConfig& config,
                                      cudaStream_t stream);

}  // namespace fastattn
